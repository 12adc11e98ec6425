// 16-bit grey of a PNG file, which browsers cut to its upper byte, scaled by 255/65535 as threefold's images.decode does.

// RGBA bytes of a PNG of 16-bit grey that the browser has found to be sound; null where it is another kind of PNG.
export async function deepGrey(bytes, chunks) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [width, height, depth, colour, interlaced] = [view.getUint32(16), view.getUint32(20), bytes[24], bytes[25], bytes[28]];
  if (depth !== 16 || colour !== 0) return null;
  if (interlaced) throw new Error("an interlaced PNG of 16-bit grey: save it without interlacing");
  const parts = chunks.filter(([name]) => name === "IDAT").map(([, at, size]) => bytes.subarray(at, at + size));
  const clear = chunks.filter(([name]) => name === "tRNS").map(([, at]) => view.getUint16(at))[0];
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = await filled(stream, (2 * width + 1) * height);
  unfilter(rows, 2 * width, height);
  const rgba = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let y = 0, to = 0; y < height; y += 1) {
    for (let x = 0, at = y * (2 * width + 1) + 1; x < width; x += 1, at += 2, to += 4) {
      const value = 256 * rows[at] + rows[at + 1];
      if (value !== clear) rgba.fill(Math.round(value / 257), to, to + 3);
    }
  }
  return new ImageData(rgba, width, height);
}

// As many bytes of a stream as there have to be, and no more.
async function filled(stream, size) {
  const whole = new Uint8Array(size), reader = stream.getReader();
  for (let at = 0; at < size; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("damaged or truncated PNG");
    const part = value.subarray(0, size - at);
    whole.set(part, at);
    at += part.length;
  }
  await reader.cancel();
  return whole;
}

// PNG's five filters (PNG specification, section 9), undone in place; each row begins with its filter's number.
function unfilter(rows, length, height) {
  for (let y = 0; y < height; y += 1) {
    const begin = y * (length + 1) + 1, filter = rows[begin - 1];
    for (let i = 0; i < length; i += 1) {
      const at = begin + i;
      const left = i < 2 ? 0 : rows[at - 2];
      const up = y ? rows[at - length - 1] : 0;
      const corner = y && i >= 2 ? rows[at - length - 3] : 0;
      if (filter === 1) rows[at] += left;
      else if (filter === 2) rows[at] += up;
      else if (filter === 3) rows[at] += (left + up) >> 1;
      else if (filter === 4) {
        const guess = left + up - corner;
        const [a, b, c] = [Math.abs(guess - left), Math.abs(guess - up), Math.abs(guess - corner)];
        rows[at] += a <= b && a <= c ? left : b <= c ? up : corner;
      }
    }
  }
}
