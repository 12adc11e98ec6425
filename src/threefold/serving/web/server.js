// Back end of the page that asks the server it came from: POST /predict, GET /card.

export const MAX_CONCURRENT = 2;
export const FORMATS = "JPEG, PNG, WebP, AVIF, BMP, TIFF, GIF";
export const note = () => "";
const FIRST_PAUSE = 500, LAST_PAUSE = 4000; // milliseconds between attempts
const byId = (id) => document.getElementById(id);
let key = "";

async function request(path, options = {}) {
  let response;
  try {
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("the server does not answer");
  }
  const tree = await response.json().catch(() => null);
  if (response.ok && tree) return tree;
  if (response.status === 401) askForKey();
  const error = new Error(tree?.error?.message ?? `the server answered ${response.status}`);
  error.status = response.status;
  throw error;
}

function askForKey() {
  byId("key").hidden = false;
  byId("key-text").focus();
}

export const card = () => request("card");

export function start(retry) {
  byId("key").onsubmit = (event) => {
    event.preventDefault();
    key = byId("key-text").value;
    byId("key").hidden = true;
    retry();
  };
  byId("curl").textContent = `curl -F files=@IMAGE ${location.origin}/predict`;
  byId("program").hidden = location.pathname.startsWith("/try/"); // `threefold ui` asks for more
}

// Sends an image, again after a pause where the server refuses it with one of the statuses.
async function post(path, file, statuses, options = {}) {
  for (let pause = FIRST_PAUSE; ; pause *= 2) {
    const form = new FormData();
    form.append("files", file, file.name || "image");
    try {
      return await request(path, { ...options, method: "POST", body: form });
    } catch (error) {
      if (!statuses.includes(error.status) || pause > LAST_PAUSE) throw error;
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
}

export async function predict(file) {
  return (await post("predict?top=5", file, [429, 503])).answers[0];
}

// What hiding parts of an image costs a class; `picture` is a Blob.
export async function explain(file, label, signal) {
  const path = `explain?class=${encodeURIComponent(label)}`;
  const found = await post(path, file, [429], { signal });
  const bytes = Uint8Array.from(atob(found.picture), (sign) => sign.charCodeAt(0));
  return { ...found, picture: new Blob([bytes], { type: "image/png" }) };
}
