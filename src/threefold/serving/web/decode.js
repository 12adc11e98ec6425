// Image files to pixels as threefold's images.decode gives them: the first frame, upright, on white, as RGB.
// The content decides what a file is; sizes are read from the header, before the browser decodes anything.

import { deepGrey } from "./deepgrey.js";

const READ = ["JPEG", "PNG", "WebP", "BMP", "GIF"];
const text = (bytes, at, count) => String.fromCharCode(...bytes.subarray(at, at + count));

export function kindOf(bytes) {
  const head = text(bytes, 0, 12);
  if (!head) throw new Error("the file is empty (0 bytes)");
  if (head.startsWith("RIFF") && head.endsWith("WEBP")) return "WebP";
  const known = { "\xff\xd8\xff": "JPEG", "\x89PNG\r\n\x1a\n": "PNG", GIF87a: "GIF", GIF89a: "GIF", BM: "BMP", "II*\0": "TIFF", "MM\0*": "TIFF", "II+\0": "TIFF", "MM\0+": "TIFF" };
  const magic = Object.keys(known).find((start) => head.startsWith(start));
  if (!magic) throw new Error(`not an image (the content is none of ${READ.join(", ")})`);
  if (known[magic] === "TIFF") throw new Error("a TIFF file, which browsers do not read: save it as PNG");
  return known[magic];
}

// Parts of a JPEG or of a chunked file: [name, where its content begins, its length].
function* segments(view, bytes, kind) {
  if (kind === "JPEG") {
    for (let at = 2; at + 4 <= bytes.length; ) {
      if (bytes[at] !== 0xff) return;
      const marker = bytes[at + 1];
      if (marker === 0xff) { at += 1; continue; } // fill bytes
      if (marker === 0x01 || (marker >= 0xd0 && marker <= 0xd8)) { at += 2; continue; }
      yield [marker, at + 4, view.getUint16(at + 2) - 2];
      if (marker === 0xda) return;
      at += 2 + view.getUint16(at + 2);
    }
  } else if (kind === "PNG") {
    for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at)) yield [text(bytes, at + 4, 4), at + 8, view.getUint32(at)];
  } else if (kind === "WebP") {
    for (let at = 12, size; at + 8 <= bytes.length; at += 8 + size + (size % 2)) {
      size = view.getUint32(at + 4, true);
      yield [text(bytes, at, 4), at + 8, size];
    }
  }
}

// Width and height by the header, EXIF not applied.
export function sizeOf(bytes, kind) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const three = (at) => view.getUint16(at, true) + 65536 * view.getUint8(at + 2) + 1;
  try {
    if (kind === "PNG") return [view.getUint32(16), view.getUint32(20)];
    if (kind === "GIF") return [view.getUint16(6, true), view.getUint16(8, true)];
    if (kind === "BMP" && view.getUint32(14, true) === 12) return [view.getUint16(18, true), view.getUint16(20, true)];
    if (kind === "BMP") return [Math.abs(view.getInt32(18, true)), Math.abs(view.getInt32(22, true))];
    if (kind === "JPEG") {
      for (const [marker, at] of segments(view, bytes, kind)) {
        const frame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
        if (frame) return [view.getUint16(at + 3), view.getUint16(at + 1)];
      }
    } else {
      const chunk = text(bytes, 12, 4);
      if (chunk === "VP8X") return [three(24), three(27)];
      if (chunk === "VP8 ") return [view.getUint16(26, true) & 0x3fff, view.getUint16(28, true) & 0x3fff];
      const bits = view.getUint32(21, true);
      return [(bits & 0x3fff) + 1, ((bits >>> 14) & 0x3fff) + 1];
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  throw new Error(`damaged or truncated ${kind}: the header is not complete`);
}

// Tag 0x0112 of the EXIF block of a PNG or WebP, 1 to 8; 1 where there is none or it is damaged.
export function orientationOf(bytes, kind) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    for (const [name, begin, size] of segments(view, bytes, kind)) {
      if (name !== "eXIf" && name !== "EXIF") continue;
      const at = text(bytes, begin, 6) === "Exif\0\0" ? begin + 6 : begin;
      const order = { "II*\0": true, "MM\0*": false }[text(bytes, at, 4)];
      if (order === undefined || at >= begin + size) return 1;
      const first = at + view.getUint32(at + 4, order);
      for (let entry = first + 2, left = view.getUint16(first, order); left > 0; entry += 12, left -= 1) {
        if (view.getUint16(entry, order) === 0x0112 && view.getUint16(entry + 2, order) === 3) return view.getUint16(entry + 8, order);
      }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return 1;
}

const AS_IT_IS = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };

// Every browser turns JPEG files upright; which of the others it turns is found out with images of 2 x 1 pixels that
// are to be turned by a quarter: 1 x 2 where it does.
const PROBES = {
  PNG: "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAIAAAB7QOjdAAAAGmVYSWZNTQAqAAAACAABARIAAwAAAAEABgAAAAAAANZnS2kAAAAPSURBVHicY2BgYGBgYAAAAAcAAVchYhkAAAAASUVORK5CYII=",
  WebP: "UklGRk4AAABXRUJQVlA4WAoAAAAIAAAAAQAAAAAAVlA4TA4AAAAvAQAAAAcQEf0PRET/A0VYSUYaAAAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAA=",
};
const turned = {};

async function turns(kind) {
  if (!(kind in PROBES)) return true;
  if (!(kind in turned)) {
    const bytes = Uint8Array.from(atob(PROBES[kind]), (sign) => sign.charCodeAt(0));
    turned[kind] = (await createImageBitmap(new Blob([bytes]), AS_IT_IS)).width === 1;
  }
  return turned[kind];
}

// Where x and y of a stored image of w x h pixels go, for each orientation.
const UPRIGHT = {
  2: (w) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w) => [0, -1, 1, 0, 0, w],
};

// RGB bytes of a file, h x w x 3, and its height and width. What is wrong with the file is the error's message.
export async function decode(file, limits) {
  if (file.size > limits.file_bytes) throw new Error(`an image file may have at most ${limits.file_bytes.toLocaleString("en")} bytes`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  const kind = kindOf(bytes);
  const size = sizeOf(bytes, kind);
  if (size[0] * size[1] > limits.pixels) throw new Error(`an image may have at most ${limits.pixels.toLocaleString("en")} pixels`);
  if (Math.max(...size) > limits.side) throw new Error(`an image may be at most ${limits.side.toLocaleString("en")} pixels wide or high`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes]), AS_IT_IS);
  } catch {
    throw new Error(`damaged or truncated ${kind}, or one that this browser cannot read`);
  }
  const deep = kind === "PNG" ? await deepGrey(bytes, [...segments(new DataView(bytes.buffer), bytes, kind)]) : null;
  if (deep) bitmap = await createImageBitmap(deep);
  const upright = !deep && (await turns(kind));
  return onWhite(bitmap, upright ? undefined : UPRIGHT[orientationOf(bytes, kind)]);
}

function onWhite(bitmap, turn) {
  const move = turn?.(bitmap.width, bitmap.height);
  const [width, height] = move?.[0] === 0 ? [bitmap.height, bitmap.width] : [bitmap.width, bitmap.height];
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  if (!context) throw new Error(`no memory for ${width} x ${height} pixels`);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  if (move) context.setTransform(...move);
  context.imageSmoothingEnabled = false;
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; to < data.length; from += 4, to += 3) {
    data[to] = rgba[from];
    data[to + 1] = rgba[from + 1];
    data[to + 2] = rgba[from + 2];
  }
  return { data, width, height };
}
