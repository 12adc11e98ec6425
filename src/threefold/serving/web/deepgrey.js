// 16-bit grey PNG files. Browsers drop the lower byte; images.decode scales by 255/65535.

// RGBA pixels of a 16-bit grey PNG that the browser can read; null for any other kind of PNG.
export async function deepGrey(bytes, chunks) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const [depth, colourType, interlace] = [bytes[24], bytes[25], bytes[28]];
  if (depth !== 16 || colourType !== 0) return null;
  if (interlace)
    throw new Error("an interlaced PNG of 16-bit grey: save it without interlacing");
  const compressed = chunks.filter(([name]) => name === "IDAT")
    .map(([, at, size]) => bytes.subarray(at, at + size));
  const [transparent] = chunks.filter(([name]) => name === "tRNS")
    .map(([, at]) => view.getUint16(at));
  const stream = new Blob(compressed).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = await readExactly(stream, (2 * width + 1) * height);
  unfilter(rows, 2 * width, height);
  const rgba = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let y = 0, to = 0; y < height; y += 1) {
    for (let x = 0, at = y * (2 * width + 1) + 1; x < width; x += 1, at += 2, to += 4) {
      const value = 256 * rows[at] + rows[at + 1];
      if (value !== transparent) rgba.fill(Math.round(value / 257), to, to + 3);
    }
  }
  return new ImageData(rgba, width, height);
}

// The first `size` bytes of a stream; it is not decompressed any further.
async function readExactly(stream, size) {
  const content = new Uint8Array(size), reader = stream.getReader();
  for (let at = 0; at < size; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("damaged or truncated PNG");
    const part = value.subarray(0, size - at);
    content.set(part, at);
    at += part.length;
  }
  await reader.cancel();
  return content;
}

// Undo PNG's five filters (PNG specification, section 9) in place. Each row begins with the number
// of its filter.
function unfilter(rows, length, height) {
  for (let y = 0; y < height; y += 1) {
    const start = y * (length + 1) + 1, filter = rows[start - 1];
    for (let i = 0; i < length; i += 1) {
      const at = start + i;
      const left = i < 2 ? 0 : rows[at - 2];
      const up = y ? rows[at - length - 1] : 0;
      const corner = y && i >= 2 ? rows[at - length - 3] : 0;
      if (filter === 1) rows[at] += left;
      else if (filter === 2) rows[at] += up;
      else if (filter === 3) rows[at] += (left + up) >> 1;
      else if (filter === 4) rows[at] += paeth(left, up, corner);
    }
  }
}

function paeth(left, up, corner) {
  const estimate = left + up - corner;
  const a = Math.abs(estimate - left), b = Math.abs(estimate - up), c = Math.abs(estimate - corner);
  if (a <= b && a <= c) return left;
  return b <= c ? up : corner;
}
