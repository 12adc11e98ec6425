// Parts of the page that its scripts share.

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function percent(p) {
  if (p > 0.9995) return ">\u00a099.9\u00a0%";
  if (p < 0.0005) return "<\u00a00.1\u00a0%";
  return `${(100 * p).toFixed(1)}\u00a0%`;
}

export function makeBar(label, probability) {
  const fill = element("span", { class: "fill" });
  fill.style.width = share(probability);
  const number = element("span", { class: "n" }, percent(probability));
  return element("li", {}, fill, element("span", {}, label), number);
}

export const share = (p) => `${Math.max(0, Math.min(100, 100 * p))}%`;
