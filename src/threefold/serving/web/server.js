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
  error.isTemporary = response.status === 429 || response.status === 503;
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
  byId("program").hidden = false;
}

export async function predict(file) {
  for (let pause = FIRST_PAUSE; ; pause *= 2) {
    const form = new FormData();
    form.append("files", file, file.name || "image");
    try {
      return (await request("predict?top=5", { method: "POST", body: form })).answers[0];
    } catch (error) {
      if (!error.isTemporary || pause > LAST_PAUSE) throw error;
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }
}
