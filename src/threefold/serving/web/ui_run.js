// The view of one run: its images, its plan, its training and its result, one below the other.

import {
  budgetText, button, call, chip, count, element, makeError, post, runPath, Unreachable,
} from "./ui_common.js";
import { makeResult, makeTryBox } from "./ui_result.js";
import { makeBar, makeCurves, makeGrid, makeNotes, Progress } from "./ui_training.js";

const BUSY_PAUSE = 1000, IDLE_PAUSE = 4000; // milliseconds between two looks
const CLASSES_SHOWN = 24, FINDINGS_SHOWN = 12;
const BUDGETS = ["2m", "5m", "10m", "20m", "40m", "1h", "2h", "4h", "8h", "0"];
const ENDS = new Set(["done", "failed", "stopped", "scored", "task"]);

export class RunView {
  constructor(name, state, onReach) {
    Object.assign(this, { name, state, onReach, position: 0, run: null, timer: 0, closed: false });
    this.progress = new Progress();
    this.node = element("div", {});
    this.sections = {};
    this.tryBox = makeTryBox(name);
    this.receive = (transfer) => {
      if (this.run?.files.includes("model.onnx")) this.tryBox.receive(transfer);
    };
    [this.error, this.showError] = makeError();
  }

  async start() {
    await this.look();
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
  }

  // Asks for what is new, draws it, and asks again after a pause.
  async look(again = false) {
    clearTimeout(this.timer);
    try {
      const isNew = await this.readEvents();
      const isDue = Date.now() - (this.looked ?? 0) > IDLE_PAUSE;
      if (!this.run || isNew || again || isDue) {
        this.run = await call(runPath(this.name));
        this.looked = Date.now();
      }
      this.onReach("");
      if (this.closed) return;
      this.draw();
    } catch (problem) {
      if (this.closed) return;
      if (problem instanceof Unreachable) this.onReach(problem.message);
      else if (!this.run) this.node.replaceChildren(backLink(), failed(problem.message));
      else this.showError(problem.message);
    }
    if (!this.closed)
      this.timer = setTimeout(() => this.look(), this.run?.running ? BUSY_PAUSE : IDLE_PAUSE);
  }

  // Whether an event says that more than the progress has changed.
  async readEvents() {
    let isNew = false;
    for (;;) {
      const { events, next } = await call(runPath(this.name, `/events?after=${this.position}`));
      this.position = next;
      for (const event of events) {
        this.progress.add(event);
        isNew ||= ENDS.has(event.event);
      }
      if (!events.length) return isNew;
    }
  }

  async act(path, body) {
    await post(runPath(this.name, path), body);
    await this.look(true);
  }

  actions() { return { onError: (text) => this.showError(text) }; }

  draw() {
    const { run } = this;
    document.title = `${run.name} · threefold`;
    if (!this.sections.head) {
      for (const name of ["head", "check", "plan", "fit", "result"])
        this.sections[name] = element("section", { class: "card", id: `step-${name}` });
      this.sections.head.className = "";
      const { head, check, plan, fit, result } = this.sections;
      this.node.replaceChildren(backLink(), head, this.error, check, plan, fit, result);
    }
    this.drawPart("head", () => this.makeHead());
    this.drawPart("check", () => this.makeCheck());
    this.drawPart("plan", () => this.makePlan());
    this.drawPart("fit", () => this.makeFit());
    this.drawProgress();
    this.drawPart("result", () => this.makeResultPart());
  }

  // Draws a part again if what it shows has changed; what is open in it stays open.
  drawPart(name, make) {
    const section = this.sections[name];
    const { key, parts, waiting, hidden } = make();
    section.hidden = Boolean(hidden);
    if (key === section.dataset.key) return;
    section.dataset.key = key;
    section.classList.toggle("waiting", Boolean(waiting));
    const open = new Set(Array.from(section.querySelectorAll("details[open]"),
      (node) => node.dataset.keep));
    section.replaceChildren(...parts());
    for (const node of section.querySelectorAll("details")) {
      if (open.has(node.dataset.keep)) node.open = true;
    }
  }

  makeHead() {
    const { run } = this;
    const failure = run.outcome === "failed" ? run.message : "";
    return {
      key: JSON.stringify([run.data, run.running, run.outcome, run.finished, run.begun, failure,
        run.planned, run.problem]),
      parts: () => {
        const title = element("div", { class: "title" }, element("h1", {}, run.name), chip(run));
        const parts = [title, element("p", { class: "path" },
          run.data ? `images: ${run.data}` : `run folder: ${run.folder}`)];
        if (run.data) parts.push(element("p", { class: "path" }, `run folder: ${run.folder}`));
        for (const text of [failure, run.problem].filter(Boolean)) parts.push(failed(text));
        return parts;
      },
    };
  }

  makeCheck() {
    const { run } = this, { check } = run;
    const heading = step(1, "Images");
    if (!run.own) return { key: "foreign", hidden: true, parts: () => [] };
    const isChecking = run.running === "check";
    const key = JSON.stringify([isChecking, check, run.begun, run.outcome]);
    const again = () => element("div", { class: "buttons" },
      button("Check again", () => this.act("/check"), this.actions()), this.makeDiscard());
    if (isChecking)
      return { key, parts: () => [heading,
        element("p", { class: "soft wait" }, "Reading and checking every image …")] };
    if (!check.findings) return { key, parts: () => [heading, again()] };
    return {
      key,
      parts: () => {
        const parts = [heading, element("p", { class: "lead", id: "counts" }, countsOf(check))];
        if (Object.keys(check.classes).length) parts.push(makeClasses(check.classes));
        parts.push(makeFindings(check.findings));
        if (!check.usable) parts.push(again());
        else if (!run.begun) parts.push(element("div", { class: "buttons" }, this.makeDiscard()));
        return parts;
      },
    };
  }

  makeDiscard() {
    return button("Discard this run", async () => {
      await post(runPath(this.name, "/discard"));
      location.hash = "#/";
    }, this.actions());
  }

  makePlan() {
    const { run } = this, { check, plan } = run;
    const heading = step(2, "Plan");
    if (!run.own) return { key: "foreign", hidden: true, parts: () => [] };
    const isReady = check.usable && run.running !== "check";
    const isPlanning = run.running === "plan";
    const notes = isPlanning ? this.progress.notes.length : 0;
    const features = isPlanning ? this.progress.features : null;
    const key = JSON.stringify([isReady, isPlanning, plan, run.begun, run.planned, run.running,
      run.outcome, notes, features]);
    if (!isReady) return { key, waiting: true, parts: () => [heading] };
    if (isPlanning)
      return { key, parts: () => [heading,
        element("p", { class: "soft wait" }, features ? this.progress.activity
          : "Measuring networks, image sizes and the speed of this machine …"),
        makeNotes(this.progress), element("div", { class: "buttons" },
          button("Stop", () => this.act("/stop"), this.actions()))] };
    return { key, parts: () => {
      const parts = [heading];
      if (run.planned || run.begun) parts.push(makeDecisions(plan, run));
      if (!run.begun) {
        if (run.planned)
          parts.push(element("div", { class: "buttons" },
            button("Start training", () => this.act("/fit"),
              { primary: true, ...this.actions() })));
        parts.push(this.makePlanForm());
      }
      return parts;
    } };
  }

  makePlanForm() {
    const { run } = this, { settings, check } = run;
    const budget = element("select", { id: "budget" }, ...BUDGETS.map((value) =>
      element("option", { value }, budgetText(value))));
    budget.value = settings.budget ?? "20m";
    const choices = Object.entries(this.state.qualities).map(([value, text]) => {
      const input = element("input", { type: "radio", name: "quality", value });
      input.checked = value === (settings.quality ?? "good");
      return element("label", { class: "choice" }, input, value, element("small", {}, text));
    });
    const skip = element("input", { type: "checkbox", id: "skip" });
    skip.checked = Boolean(settings.skip_bad);
    const form = element("div", {},
      element("p", {}, element("label", { for: "budget", class: "field" }, "Time budget "), budget),
      element("fieldset", {}, element("legend", {}, "Quality"), ...choices));
    if (check.skipped)
      form.append(element("label", { class: "choice" }, skip,
        `Leave out the ${count(check.skipped, "file")} that cannot be read`));
    const make = button(run.planned ? "Plan again" : "Make a plan", () => {
      if (check.skipped && !skip.checked)
        throw new Error(`${count(check.skipped, "file")} cannot be read: mend them and check `
          + "again, or leave them out");
      const quality = form.querySelector("input[name=quality]:checked").value;
      const body = { budget: budget.value, quality, skip_bad: skip.checked };
      return this.act("/plan", body);
    }, { primary: !run.planned, ...this.actions() });
    form.append(element("div", { class: "buttons" }, make));
    if (!run.planned) return form;
    return element("details", { "data-keep": "replan" },
      element("summary", {}, "Change budget or quality"), form);
  }

  makeFit() {
    const { run, progress } = this;
    const heading = step(3, "Training");
    const isTraining = run.running === "fit";
    if (!run.own) {
      const isDone = run.finished;
      return { key: `foreign ${isDone}`, hidden: isDone, parts: () => [heading,
        element("p", {}, "This run was started elsewhere and is not finished; resume it where you "
          + "started it.")] };
    }
    if (!run.begun && !isTraining)
      return { key: "waiting", waiting: true, parts: () => [heading] };
    const key = JSON.stringify([isTraining, run.outcome, run.finished]);
    return { key, parts: () => {
      this.bar = element("div", {});
      this.curves = element("div", {});
      this.notes = element("div", {});
      const parts = [heading, this.bar];
      if (isTraining) {
        parts.push(element("div", { class: "buttons" },
          button("Stop; what is done is kept", () => this.act("/stop"), this.actions())));
      } else if (!run.finished) {
        parts.push(element("p", { class: "lead" }, "What was finished is kept; training goes on "
          + "where it was stopped."), element("div", { class: "buttons" },
          button("Resume", () => this.act("/fit"), { primary: true, ...this.actions() })));
      }
      return [...parts, this.curves, this.notes];
    } };
  }

  // What changes every second of a training; the rest of the part stays, so buttons can be pressed.
  drawProgress() {
    const { run, progress } = this;
    if (!this.bar || progress.task !== "fit") return;
    const metric = run.metric ?? "accuracy";
    this.bar.replaceChildren(...(run.running === "fit" ? makeBar(progress, run) : []));
    this.curves.replaceChildren(makeGrid(progress, metric), ...makeCurves(progress, metric));
    const number = String(progress.notes.length);
    if (this.notes.dataset.number === number) return;
    this.notes.dataset.number = number;
    const isOpen = this.notes.querySelector("details")?.open;
    this.notes.replaceChildren(makeNotes(progress));
    if (isOpen) this.notes.querySelector("details").open = true;
  }

  makeResultPart() {
    const { run } = this, heading = step(run.own ? 4 : 1, "Result");
    if (!run.scores) return { key: "none", waiting: true, parts: () => [heading] };
    const key = JSON.stringify([run.scores, run.files, run.pending, run.notes]);
    return { key, parts: () => [heading, ...makeResult(run, this.tryBox)] };
  }
}

const backLink = () =>
  element("p", { class: "crumb" }, element("a", { href: "#/" }, "← all runs"));
const failed = (text) => element("p", { class: "note bad", role: "alert" }, text);
const step = (number, text) =>
  element("h2", {}, element("span", { class: "step" }, String(number)), text);

function countsOf({ classes, sizes }) {
  const parts = Object.values(classes);
  if (!parts.length) return "These images cannot be used.";
  const sum = (part) => parts.reduce((total, counts) => total + (counts[part] ?? 0), 0);
  const [train, test] = [sum("train"), sum("test")];
  const words = [count(train, "training image"),
    test ? count(test, "test image") : "no test images", count(parts.length, "class", "classes")];
  const common = Object.keys(sizes)[0];
  if (common) words.push(`most often ${common} pixels`);
  return words.join(", ");
}

function makeClasses(classes) {
  const entries = Object.entries(classes).map(([name, parts]) => [name, parts.train]);
  const most = Math.max(...entries.map(([, n]) => n), 1);
  entries.sort((a, b) => b[1] - a[1]);
  const items = entries.slice(0, CLASSES_SHOWN).map(([name, n]) => {
    const fill = element("span", { class: "fill" });
    fill.style.width = `${100 * n / most}%`;
    return element("li", {}, fill, element("span", {}, name),
      element("span", { class: "n" }, n.toLocaleString("en")));
  });
  const more = entries.length - items.length;
  if (more > 0) items.push(element("li", {}, element("span", { class: "soft" }, `and ${more} more`)));
  return element("ul", { class: "classes", "aria-label": "training images of each class" }, ...items);
}

function makeFindings(findings) {
  const kinds = { error: "bad", warning: "warn", note: "" };
  const order = Object.keys(kinds);
  const sorted = [...findings].sort((a, b) => order.indexOf(a.level) - order.indexOf(b.level));
  const items = sorted.map(({ level, what }) => element("li", {},
    element("span", { class: `chip ${kinds[level]}` }, level), element("span", {}, what)));
  if (!items.length)
    return element("p", { class: "soft" }, "Nothing stands out.");
  const shown = element("ul", { class: "findings" }, ...items.slice(0, FINDINGS_SHOWN));
  if (items.length <= FINDINGS_SHOWN) return shown;
  return element("div", {}, shown, element("details", { "data-keep": "more-findings" },
    element("summary", {}, `and ${items.length - FINDINGS_SHOWN} more`),
    element("ul", { class: "findings" }, ...items.slice(FINDINGS_SHOWN))));
}

function makeDecisions(plan, run) {
  if (!plan.decisions) return element("p", { class: "soft" }, "The plan is in recipe.toml.");
  const { budget, quality } = plan.settings;
  const members = plan.members.map(([name]) => name).join(", ");
  const lead = element("p", { class: "lead", id: "planned" },
    `${count(plan.members.length, "member")} (${members}), within ${budgetText(budget)}, `
    + `quality ${quality}.`);
  const rows = plan.decisions.map(([key, value, reason]) => element("tr", {},
    element("th", { scope: "row" }, element("code", {}, key)),
    element("td", {}, element("code", {}, value)), element("td", { class: "soft" }, reason)));
  const head = ["choice", "value", "because"].map((t) => element("th", { scope: "col" }, t));
  const table = element("table", { class: "plain choices" },
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  const details = element("details", { "data-keep": `decisions ${run.begun}` },
    element("summary", {}, `The ${rows.length} choices, with their reasons`),
    element("div", { class: "scroll" }, table));
  details.open = !run.begun;
  return element("div", {}, lead, details);
}
