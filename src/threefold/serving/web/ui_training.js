// What a run reports while it trains: how far it is, a grid of its jobs, and learning curves.

import { budgetText, drawing, duration, element, percent } from "./ui_common.js";

const COLOURS = 6, MAX_NOTES = 200;
const WIDTH = 420, HEIGHT = 190, LEFT = 44, BOTTOM = 22, TOP = 8, RIGHT = 8;
const keyOf = ([member, fold, stage]) => `${member}|${fold}|${stage}`;

// Keeps what the events of a run say; `add` takes them in order, from the first one.
export class Progress {
  constructor() {
    this.lines = new Map(); // "member|fold" -> Map of "stage|epoch" -> [loss, accuracy]
    this.scores = new Map(); // job -> accuracy of its last epoch
    this.notes = [];
    this.begin("");
  }

  begin(task) {
    Object.assign(this, {
      task, jobs: [], images: [], states: new Map(), running: [], seen: new Map(), features: null,
      speeds: new Map(), scored: null,
    });
    this.notes = [];
  }

  add(event) {
    const handler = this[`on_${event.event}`];
    if (handler) handler.call(this, event);
  }

  on_task({ task }) { this.begin(task); }

  on_jobs({ jobs, images }) {
    Object.assign(this, { jobs, images, states: new Map(), seen: new Map(), running: [] });
  }

  on_job({ job, skipped }) {
    this.states.set(keyOf(job), skipped ? "done" : "now");
    this.seen.set(keyOf(job), 0);
    if (!skipped) this.running.push(job);
  }

  on_ended({ job, done }) {
    this.states.set(keyOf(job), done ? "done" : "waiting");
    this.running = this.running.filter((other) => keyOf(other) !== keyOf(job));
  }

  on_progress({ job, images }) { this.seen.set(keyOf(job), images); }
  on_features({ done, total }) { this.features = done < total ? [done, total] : null; }
  on_scored({ accuracy, pending }) {
    this.scored = { accuracy, pending };
    this.running = [];
  }
  on_note({ text }) {
    this.notes.push(text);
    if (this.notes.length > MAX_NOTES) this.notes.shift();
  }
  on_done() { this.running = []; }

  on_epoch(event) {
    const [member, fold, stage] = event.job;
    const line = `${member}|${fold}`, key = keyOf(event.job);
    if (!this.lines.has(line)) this.lines.set(line, new Map());
    const values = [Number(event.loss), Number(event.select_accuracy)];
    this.lines.get(line).set(`${stage}|${event.epoch}`, values);
    this.scores.set(key, values[1]);
    this.speeds.set(key, event.images_per_second ?? 0);
    if (event.images) this.seen.set(key, event.images);
  }

  // The share of the jobs' images that are behind us; null before the jobs are known.
  get share() {
    const total = this.images.reduce((a, b) => a + b, 0);
    if (!total) return null;
    let done = 0;
    this.jobs.forEach((job, i) => {
      const state = this.states.get(keyOf(job));
      if (state === "done") done += this.images[i];
      if (state === "now") done += Math.min(this.seen.get(keyOf(job)) ?? 0, this.images[i]);
    });
    return done / total;
  }

  get activity() {
    if (this.features)
      return `features of the frozen networks: ${this.features[0].toLocaleString("en")} of `
        + `${this.features[1].toLocaleString("en")} images`;
    if (this.running.length) {
      const speed = this.running.reduce((sum, job) => sum + (this.speeds.get(keyOf(job)) ?? 0), 0);
      const names = this.running.map((job) => job.join(" ")).join(", ");
      return names + (speed ? `, ${Math.round(speed)} images a second` : "");
    }
    if (this.scored) return "scored; the file is exported and the report written";
    return this.jobs.length ? "scoring the ensembles" : "reading the images";
  }
}

export function makeBar(progress, run) {
  const share = progress.share;
  const attributes = { max: "1", "aria-label": "share of the training that is done" };
  if (share !== null) attributes.value = String(share);
  const limit = Number.parseFloat(run.settings?.budget) ? run.settings.budget : "";
  const spent = run.since && run.running ? duration(Date.now() / 1000 - run.since) : "";
  const words = [progress.activity];
  if (spent) words.push(limit ? `${spent} of at most ${budgetText(limit)}` : spent);
  return [element("progress", attributes),
    element("p", { class: "soft", id: "activity" }, words.join(" · "))];
}

// What an epoch is scored by, in words.
const WORDS = { accuracy: "accuracy", mAP: "share of right labels" };
const begin = (text) => text[0].toUpperCase() + text.slice(1);

// A row for each member and stage, a cell for each fold.
export function makeGrid(progress, metric) {
  if (!progress.jobs.length) return "";
  const folds = [...new Set(progress.jobs.map(([, fold]) => fold))];
  const rows = [...new Set(progress.jobs.map(([member, , stage]) => `${member}|${stage}`))];
  const known = new Set(progress.jobs.map(keyOf));
  const cell = (member, fold, stage) => {
    const key = keyOf([member, fold, stage]);
    const state = known.has(key) ? progress.states.get(key) ?? "waiting" : "none";
    const words = { now: "in training", none: "not in this fold" }[state] ?? state;
    const score = progress.scores.get(key);
    const accuracy = score === undefined ? "" : `, ${WORDS[metric]} ${percent(score)}`;
    const title = `${member} ${fold} ${stage}: ${words}${accuracy}`;
    return element("td", {},
      element("span", { class: `cell ${state}`, role: "img", title, "aria-label": title },
        score === undefined ? "" : String(Math.round(100 * score))));
  };
  const head = ["", ...folds].map((name) => element("th", { scope: "col" },
    name.replace("fold", "fold ")));
  const body = rows.map((row) => {
    const [member, stage] = row.split("|");
    return element("tr", {}, element("th", { scope: "row" }, `${member} `,
      element("span", { class: "soft" }, stage)), ...folds.map((fold) => cell(member, fold, stage)));
  });
  const grid = element("div", { class: "grid" }, element("table", {},
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body)));
  if (progress.scores.size)
    grid.append(element("p", { class: "path" },
      `${begin(WORDS[metric])} in % after the last epoch, on the images that choose the epoch; `
      + "no final score."));
  return grid;
}

// Loss and score of every member and fold, epoch by epoch; heads have one epoch and no curve.
export function makeCurves(progress, metric) {
  const long = [...progress.lines].filter(([, records]) => records.size > 1);
  if (!long.length) return [];
  const members = [...new Set(long.map(([key]) => key.split("|")[0]))];
  const colour = (key) => `series-${members.indexOf(key.split("|")[0]) % COLOURS}`;
  const lines = (index) => long.map(([key, records]) => ({
    name: key.replace("|", " "), colour: colour(key),
    values: [...records.values()].map((pair) => pair[index]).filter(Number.isFinite),
  }));
  const legend = element("div", { class: "legend" }, ...members.map((name) => element("span", {},
    drawing("svg", { viewBox: "0 0 14 6", "aria-hidden": "true" },
      drawing("line", { x1: 0, y1: 3, x2: 14, y2: 3, class: `line ${colour(name)}` })), name)));
  return [
    element("div", { class: "charts" },
      makeChart("Loss on the training images", lines(0), (v) => v.toPrecision(2)),
      makeChart(`${begin(WORDS[metric])} on the images that choose the epoch`, lines(1),
        (v) => percent(v, 0))),
    legend,
  ];
}

function makeChart(title, lines, format) {
  const values = lines.flatMap((line) => line.values);
  const longest = Math.max(...lines.map((line) => line.values.length), 2);
  let low = Math.min(...values), high = Math.max(...values);
  if (high - low < 1e-3) { low -= 0.05; high += 0.05; }
  const x = (i) => LEFT + (WIDTH - LEFT - RIGHT) * i / (longest - 1);
  const y = (v) => TOP + (HEIGHT - TOP - BOTTOM) * (high - v) / (high - low);
  const parts = [0, 0.5, 1].flatMap((share) => {
    const value = low + share * (high - low);
    return [
      drawing("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value), class: "axis" }),
      drawing("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)),
    ];
  });
  parts.push(drawing("text", { x: LEFT, y: HEIGHT - 5 }, "epoch 1"));
  parts.push(drawing("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" },
    String(longest)));
  for (const { name, colour, values: own } of lines) {
    const label = drawing("title", {}, `${name}: ${format(own.at(-1))}`);
    const points = own.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    parts.push(drawing("polyline", { points, class: `line ${colour}` }, label));
  }
  const svg = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": title }, ...parts);
  return element("figure", { class: "chart" }, element("figcaption", {}, title), svg);
}

export function makeNotes(progress, summary = "Notes") {
  if (!progress.notes.length) return "";
  const items = progress.notes.map((text) => element("li", {}, text));
  return element("details", { "data-keep": "notes" },
    element("summary", {}, `${summary} (${items.length})`),
    element("ul", { class: "notes" }, ...items));
}
