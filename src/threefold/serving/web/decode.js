// Image files to pixels, as images.decode gives them: the first frame, upright, on white, as RGB.
// The content decides the format of a file. Sizes are read from the header, before the browser
// decodes anything.

import { deepGrey } from "./deepgrey.js";

const FORMATS = ["JPEG", "PNG", "WebP", "BMP", "GIF"];
const MAGIC = {
  "\xff\xd8\xff": "JPEG",
  "\x89PNG\r\n\x1a\n": "PNG",
  GIF87a: "GIF",
  GIF89a: "GIF",
  BM: "BMP",
  "II*\0": "TIFF",
  "MM\0*": "TIFF",
  "II+\0": "TIFF",
  "MM\0+": "TIFF",
};
const ORIENTATION_TAG = 0x0112, SHORT = 3; // EXIF

const textAt = (bytes, at, count) => String.fromCharCode(...bytes.subarray(at, at + count));
const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

export function formatOf(bytes) {
  const head = textAt(bytes, 0, 12);
  if (!head) throw new Error("the file is empty (0 bytes)");
  if (head.startsWith("RIFF") && head.endsWith("WEBP")) return "WebP";
  const magic = Object.keys(MAGIC).find((start) => head.startsWith(start));
  if (!magic) throw new Error(`not an image (the content is none of ${FORMATS.join(", ")})`);
  if (MAGIC[magic] === "TIFF")
    throw new Error("a TIFF file, which browsers do not read: save it as PNG");
  return MAGIC[magic];
}

// Segments of a JPEG, chunks of a PNG or WebP: [name or marker, start of its content, its length].
function* segments(bytes, format) {
  const view = viewOf(bytes);
  if (format === "JPEG") {
    for (let at = 2; at + 4 <= bytes.length; ) {
      if (bytes[at] !== 0xff) return;
      const marker = bytes[at + 1];
      if (marker === 0xff) { at += 1; continue; } // fill bytes
      if (marker === 0x01 || (marker >= 0xd0 && marker <= 0xd8)) { at += 2; continue; }
      yield [marker, at + 4, view.getUint16(at + 2) - 2];
      if (marker === 0xda) return;
      at += 2 + view.getUint16(at + 2);
    }
  } else if (format === "PNG") {
    for (let at = 8; at + 12 <= bytes.length; at += 12 + view.getUint32(at))
      yield [textAt(bytes, at + 4, 4), at + 8, view.getUint32(at)];
  } else if (format === "WebP") {
    for (let at = 12, size; at + 8 <= bytes.length; at += 8 + size + (size % 2)) {
      size = view.getUint32(at + 4, true);
      yield [textAt(bytes, at, 4), at + 8, size];
    }
  }
}

// What `read` returns; null where it reads beyond the end of the file.
function readWithin(read) {
  try {
    return read();
  } catch (error) {
    if (error instanceof RangeError) return null;
    throw error;
  }
}

// Width and height from the header, before EXIF rotation.
export function sizeOf(bytes, format) {
  const size = readWithin(() => declaredSize(bytes, format));
  if (!size) throw new Error(`damaged or truncated ${format}: the header is not complete`);
  return size;
}

function declaredSize(bytes, format) {
  const view = viewOf(bytes);
  const u16 = (at) => view.getUint16(at, true);
  if (format === "PNG") return [view.getUint32(16), view.getUint32(20)];
  if (format === "GIF") return [u16(6), u16(8)];
  if (format === "BMP" && view.getUint32(14, true) === 12) return [u16(18), u16(20)];
  if (format === "BMP")
    return [Math.abs(view.getInt32(18, true)), Math.abs(view.getInt32(22, true))];
  if (format === "JPEG") {
    for (const [marker, at] of segments(bytes, format)) {
      const isFrame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
      if (isFrame) return [view.getUint16(at + 3), view.getUint16(at + 1)];
    }
    return null;
  }
  const chunk = textAt(bytes, 12, 4); // WebP
  const u24 = (at) => u16(at) + 65536 * view.getUint8(at + 2);
  if (chunk === "VP8X") return [u24(24) + 1, u24(27) + 1];
  if (chunk === "VP8 ") return [u16(26) & 0x3fff, u16(28) & 0x3fff];
  const bits = view.getUint32(21, true);
  return [(bits & 0x3fff) + 1, ((bits >>> 14) & 0x3fff) + 1];
}

// Orientation of a PNG or WebP by its EXIF block, 1 to 8; 1 if there is none or it is damaged.
export const orientationOf = (bytes, format) =>
  readWithin(() => declaredOrientation(bytes, format)) ?? 1;

function declaredOrientation(bytes, format) {
  const view = viewOf(bytes);
  for (const [name, start, size] of segments(bytes, format)) {
    if (name !== "eXIf" && name !== "EXIF") continue;
    const at = textAt(bytes, start, 6) === "Exif\0\0" ? start + 6 : start;
    const isLittleEndian = { "II*\0": true, "MM\0*": false }[textAt(bytes, at, 4)];
    if (isLittleEndian === undefined || at >= start + size) return 1;
    const u16 = (position) => view.getUint16(position, isLittleEndian);
    const directory = at + view.getUint32(at + 4, isLittleEndian);
    for (let i = 0; i < u16(directory); i += 1) {
      const entry = directory + 2 + 12 * i;
      if (u16(entry) === ORIENTATION_TAG && u16(entry + 2) === SHORT) return u16(entry + 8);
    }
  }
  return 1;
}

const BITMAP_OPTIONS = {
  imageOrientation: "from-image",
  colorSpaceConversion: "none",
  premultiplyAlpha: "none",
};

// Every browser turns JPEG files upright. Whether it does so for other formats is tested with
// images of 2 x 1 pixels whose EXIF block asks for a quarter turn: 1 x 2 if the browser turns them.
const PROBES = {
  PNG: "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAIAAAB7QOjdAAAAGmVYSWZNTQAqAAAACAABARIAAwAA"
    + "AAEABgAAAAAAANZnS2kAAAAPSURBVHicY2BgYGBgYAAAAAcAAVchYhkAAAAASUVORK5CYII=",
  WebP: "UklGRk4AAABXRUJQVlA4WAoAAAAIAAAAAQAAAAAAVlA4TA4AAAAvAQAAAAcQEf0PRET/A0VYSUYa"
    + "AAAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAA=",
};
const turnedByBrowser = {};

async function browserTurns(format) {
  if (!(format in PROBES)) return true;
  if (!(format in turnedByBrowser)) {
    const bytes = Uint8Array.from(atob(PROBES[format]), (character) => character.charCodeAt(0));
    const bitmap = await createImageBitmap(new Blob([bytes]), BITMAP_OPTIONS);
    turnedByBrowser[format] = bitmap.width === 1;
  }
  return turnedByBrowser[format];
}

// Arguments of setTransform that turn an image of w x h pixels upright, by orientation.
const TRANSFORMS = {
  2: (w) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w) => [0, -1, 1, 0, 0, w],
};

const grouped = (number) => number.toLocaleString("en");

function checkSize([width, height], limits) {
  if (width * height > limits.pixels)
    throw new Error(`an image may have at most ${grouped(limits.pixels)} pixels`);
  if (Math.max(width, height) > limits.side)
    throw new Error(`an image may be at most ${grouped(limits.side)} pixels wide or high`);
}

// RGB bytes of a file, h x w x 3, with its height and width. Errors say what is wrong with it.
export async function decode(file, limits) {
  if (file.size > limits.file_bytes)
    throw new Error(`an image file may have at most ${grouped(limits.file_bytes)} bytes`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  const format = formatOf(bytes);
  checkSize(sizeOf(bytes, format), limits);
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes]), BITMAP_OPTIONS);
  } catch {
    throw new Error(`damaged or truncated ${format}, or one that this browser cannot read`);
  }
  const deep = format === "PNG" ? await deepGrey(bytes, [...segments(bytes, format)]) : null;
  if (deep) bitmap = await createImageBitmap(deep);
  const isUpright = !deep && (await browserTurns(format));
  return drawOnWhite(bitmap, isUpright ? undefined : TRANSFORMS[orientationOf(bytes, format)]);
}

function drawOnWhite(bitmap, transform) {
  const matrix = transform?.(bitmap.width, bitmap.height);
  const isQuarterTurn = matrix?.[0] === 0;
  const width = isQuarterTurn ? bitmap.height : bitmap.width;
  const height = isQuarterTurn ? bitmap.width : bitmap.height;
  const options = { willReadFrequently: true, colorSpace: "srgb" };
  const context = new OffscreenCanvas(width, height).getContext("2d", options);
  if (!context) throw new Error(`no memory for ${width} x ${height} pixels`);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  if (matrix) context.setTransform(...matrix);
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
