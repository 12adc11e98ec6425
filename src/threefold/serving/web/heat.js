// What hiding parts of an image costs a class, and its picture, as runtime/heat.py computes them.

const CELLS = 7, SQUARE = 2, ROUNDING = 1e-5;
const BATCH = 8, BATCH_PIXELS = 4_000_000; // at most that many images or pixels at a time
const LARGEST = 1024, SMALLEST = 448, OPACITY = 0.75; // of the picture
const COLOURS = [
  [43, 11, 87], [111, 25, 110], [176, 49, 91], [229, 92, 48], [252, 161, 8], [241, 239, 117]];
const WEIGHT_STEPS = 65536, MAX_SCALE = 256; // as in runtime/canvas.py
const single = Math.fround;

// The nearest whole number, the even one of two, as numpy rounds.
function rint(value) {
  const low = Math.floor(value), rest = value - low;
  return low + Number(rest > 0.5 || (rest === 0.5 && low % 2 !== 0));
}

// The size and mode that all members resize images to; null if they have several.
export function commonCanvas({ preprocessing }) {
  if (!Array.isArray(preprocessing) || !preprocessing.length) return null;
  const [{ pixels: size, resize: mode, filter }] = preprocessing;
  const isSame = (part) =>
    part.pixels === size && part.resize === mode && part.filter === filter;
  const isKnown = filter === "triangle, antialiased" && ["squash", "crop"].includes(mode);
  return isKnown && preprocessing.every(isSame) ? { size, mode } : null;
}

// For each of `size` places, the pixels of a line that it takes and their weights. The arithmetic
// is that of the graph, in single precision, so that the weights are the same numbers.
function triangleWeights(length, start, side, size) {
  const scale = single(side / size), reach = Math.max(scale, 1);
  return Array.from({ length: size }, (_, place) => {
    const centre = single(start + single((place + 0.5) * scale));
    const first = Math.max(start, Math.floor(centre - reach) - 1);
    const last = Math.min(start + side, length, Math.ceil(centre + reach) + 1);
    const weights = [];
    for (let at = first; at < last; at += 1) {
      const distance = single(Math.abs(single(at + 0.5 - centre)) / reach);
      weights.push(rint(single(Math.max(0, single(1 - distance)) * WEIGHT_STEPS)));
    }
    const sum = weights.reduce((total, weight) => total + weight, 0);
    const shares = weights.map((weight) => rint(single(single(weight / sum) * WEIGHT_STEPS)));
    return { first, shares: shares.map((share) => share / WEIGHT_STEPS) };
  });
}

const toByte = (value) => Math.min(255, Math.max(0, Math.floor(value + 0.5)));

// An image on the canvas of all members, as the graph itself would resize it.
export function fitCanvas(image, { size, mode }) {
  const { data, width, height } = image;
  const side = Math.min(width, height);
  const [acrossSide, downSide] = mode === "crop" ? [side, side] : [width, height];
  if (Math.max(acrossSide, downSide) > MAX_SCALE * size) return image;
  const across = triangleWeights(width, Math.floor((width - acrossSide) / 2), acrossSide, size);
  const down = triangleWeights(height, Math.floor((height - downSide) / 2), downSide, size);
  const rows = new Uint8Array(height * size * 3), square = new Uint8Array(size * size * 3);
  for (let y = 0; y < height; y += 1)
    weigh(across, rows, y * size * 3, 3, data, y * width * 3, 3);
  for (let x = 0; x < size; x += 1)
    weigh(down, square, x * 3, size * 3, rows, x * 3, size * 3);
  return { data: square, width: size, height: size };
}

// One line of pixels to another, each with its first byte and the bytes from pixel to pixel.
function weigh(weights, target, to, toStep, source, from, fromStep) {
  for (const { first, shares } of weights) {
    for (let channel = 0; channel < 3; channel += 1) {
      let sum = 0, at = from + first * fromStep + channel;
      for (const share of shares) {
        sum += share * source[at];
        at += fromStep;
      }
      target[to + channel] = toByte(sum);
    }
    to += toStep;
  }
}

// An image of at most the pixels of a batch: it is answered 65 times.
function reduce(image) {
  const factor = Math.sqrt(BATCH_PIXELS / (image.width * image.height));
  if (factor >= 1) return image;
  const width = Math.max(1, Math.floor(factor * image.width));
  const height = Math.max(1, Math.floor(factor * image.height));
  const rgba = draw(image, width, height).getImageData(0, 0, width, height).data;
  return { data: rgba.filter((_, i) => i % 4 !== 3), width, height };
}

// A canvas with an image in another size.
function draw({ data, width, height }, newWidth, newHeight) {
  const rgba = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let from = 0, to = 0; from < data.length; from += 3, to += 4) {
    rgba[to] = data[from];
    rgba[to + 1] = data[from + 1];
    rgba[to + 2] = data[from + 2];
  }
  const options = { willReadFrequently: true, colorSpace: "srgb" };
  const original = new OffscreenCanvas(width, height);
  original.getContext("2d", options).putImageData(new ImageData(rgba, width, height), 0, 0);
  const context = new OffscreenCanvas(newWidth, newHeight).getContext("2d", options);
  context.imageSmoothingQuality = "high";
  context.drawImage(original, 0, 0, newWidth, newHeight);
  return context;
}

// Answers an image, and it with each of 64 squares hidden. `answer` maps an image's bytes, those of
// several images one after the other, their count, height and width to the rows of probabilities.
async function occlude(answer, { data, width, height }, number) {
  const edges = (length) => Array.from({ length: CELLS + 1 }, (_, i) => rint((i * length) / CELLS));
  const rows = edges(height), columns = edges(width), colour = meanColour(data);
  const spans = Array.from({ length: CELLS + SQUARE - 1 }, (_, i) =>
    [Math.max(0, i - SQUARE + 1), Math.min(CELLS, i + 1)]);
  const places = spans.flatMap((down) => spans.map((across) => [down, across]));
  const size = Math.max(1, Math.min(BATCH, Math.floor(BATCH_PIXELS / (width * height))));
  const [whole] = await answer(data, 1, height, width);
  const cells = Array.from({ length: CELLS }, () => new Array(CELLS).fill(0));
  let lowest = Infinity;
  for (let begin = 0; begin < places.length; begin += size) {
    const part = places.slice(begin, begin + size);
    const hidden = new Uint8Array(part.length * data.length);
    part.forEach(([[top, bottom], [left, right]], i) => {
      hidden.set(data, i * data.length);
      for (let y = rows[top]; y < rows[bottom]; y += 1)
        for (let x = columns[left]; x < columns[right]; x += 1)
          hidden.set(colour, i * data.length + (y * width + x) * 3);
    });
    const answers = await answer(hidden, part.length, height, width);
    part.forEach(([[top, bottom], [left, right]], i) => {
      lowest = Math.min(lowest, answers[i][number]);
      const drop = (whole[number] - answers[i][number]) / SQUARE ** 2;
      for (let y = top; y < bottom; y += 1)
        for (let x = left; x < right; x += 1) cells[y][x] += drop;
    });
  }
  const warm = cells.map((row) => row.map((loss) => Math.max(0, loss)));
  return { cells: warm, probability: whole[number], lowest };
}

function meanColour(data) {
  const sums = [0, 0, 0];
  for (let i = 0; i < data.length; i += 1) sums[i % 3] += data[i];
  return sums.map((sum) => rint((3 * sum) / data.length));
}

// The explanation that the server gives for one image (serving/explain.py); `picture` is a Blob.
export async function explain(answer, pixels, number, card) {
  const canvas = commonCanvas(card);
  const image = canvas ? fitCanvas(pixels, canvas) : pixels;
  const cropped = canvas?.mode === "crop"
    && (image.width !== pixels.width || image.height !== pixels.height);
  const found = await occlude(answer, reduce(image), number);
  return { ...found, cropped, picture: await overlay(pixels, found.cells, cropped) };
}

// The picture: clear where it is cold, yellow where it is hot.
async function overlay(pixels, cells, cropped) {
  const longest = Math.max(pixels.width, pixels.height);
  const factor = Math.min(LARGEST, Math.max(SMALLEST, longest)) / longest;
  const width = Math.max(1, Math.round(factor * pixels.width));
  const height = Math.max(1, Math.round(factor * pixels.height));
  const context = draw(pixels, width, height), image = context.getImageData(0, 0, width, height);
  const heat = spread(cells, height, width, cropped);
  heat.forEach((warmth, i) => {
    if (!warmth) return;
    const opacity = OPACITY * warmth, place = warmth * (COLOURS.length - 1);
    const below = Math.min(COLOURS.length - 2, Math.floor(place)), share = place - below;
    for (let channel = 0; channel < 3; channel += 1) {
      const [low, high] = [COLOURS[below][channel], COLOURS[below + 1][channel]];
      const at = 4 * i + channel;
      image.data[at] = (1 - opacity) * image.data[at] + opacity * (low + share * (high - low));
    }
  });
  context.putImageData(image, 0, 0);
  return context.canvas.convertToBlob({ type: "image/png" });
}

// The cells over an image, linear between their centres: row after row, in 0 .. 1.
function spread(cells, height, width, cropped) {
  const side = Math.min(height, width);
  const [down, across] = cropped ? [side, side] : [height, width];
  const top = Math.floor((height - down) / 2), left = Math.floor((width - across) / 2);
  const heat = new Float32Array(height * width);
  const places = (length) => Array.from({ length }, (_, i) => {
    const place = Math.min(CELLS - 1, Math.max(0, ((i + 0.5) * CELLS) / length - 0.5));
    const below = Math.min(CELLS - 2, Math.floor(place));
    return [below, place - below];
  });
  const columns = places(across);
  let largest = 0;
  places(down).forEach(([row, low], y) => columns.forEach(([column, right], x) => {
    const mix = (line) => (1 - right) * line[column] + right * line[column + 1];
    const value = (1 - low) * mix(cells[row]) + low * mix(cells[row + 1]);
    heat[(top + y) * width + left + x] = value;
    largest = Math.max(largest, value);
  }));
  return heat.map((value) => (largest > ROUNDING ? value / largest : 0));
}
