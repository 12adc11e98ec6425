// Answers by the server that the page came from: POST /predict, GET /card.

export const AT_ONCE = 2;
export const FORMATS = "JPEG, PNG, WebP, BMP, TIFF, GIF";
export const note = () => "";
const byId = (id) => document.getElementById(id);
let key = "";

const headers = () => (key ? { authorization: `Bearer ${key}` } : {});

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers() });
  } catch {
    throw new Error("the server does not answer");
  }
  const tree = await response.json().catch(() => null);
  if (response.ok && tree) return tree;
  if (response.status === 401) askForKey();
  const error = new Error(tree?.error?.message ?? `the server answered ${response.status}`);
  error.again = response.status === 429 || response.status === 503;
  throw error;
}

function askForKey() {
  byId("key").hidden = false;
  byId("key-text").focus();
}

export const card = () => ask("card");

export function start(again) {
  byId("key").onsubmit = (event) => {
    event.preventDefault();
    key = byId("key-text").value;
    byId("key").hidden = true;
    again();
  };
  byId("curl").textContent = `curl -F files=@IMAGE ${location.origin}/predict`;
  byId("program").hidden = false;
}

export async function answer(file) {
  for (let pause = 500; ; pause *= 2) {
    const form = new FormData();
    form.append("files", file, file.name || "image");
    try {
      return (await ask("predict?top=5", { method: "POST", body: form })).answers[0];
    } catch (error) {
      if (!error.again || pause > 4000) throw error;
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
}
