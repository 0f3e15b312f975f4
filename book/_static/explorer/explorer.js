// The forgetting explorer. It reads window.fmnExplorer, which book/explorer.py writes, and computes
// what it shows as fmnlib.scores and fmnlib.fusion do, in the same order of the same operations.
(() => {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";
  const TALLY = { then: 0, forgotten: 0, learned: 0, mixed: 0, back: 0, lost: 0 };
  const PLAY = "▶ Play";
  const SHEET = 20; // images in a row of the sheet that all tiles are cut from
  const PAUSE = 350; // ms between two epochs while it plays
  const OPENING = 1500; // ms without a mix, before it is mixed in for the first time
  const RAMP = 2000; // ms until it is mixed in
  const SETTLED = 600; // ms without a change, after which the change is spoken

  // ------------------------------------------------------------------ the record

  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

  // A half-precision number, from its 16 bits.
  function half(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  }

  function read(data) {
    const { labels, kept, classes, window: wide } = data;
    const samples = labels.length;
    const last = kept.length - 1;
    const raw = bytes(data.probs);
    const view = new DataView(raw.buffer);
    const probs = Float64Array.from({ length: raw.length / 2 }, (_, n) => half(view.getUint16(2 * n, true)));
    const predicted = bytes(data.predicted);
    const correct = kept.map((_, row) => labels.map((label, n) => predicted[row * samples + n] === label));

    // What the mix predicts: the final network, and with the share the mean of a row's window.
    function mix(row, share) {
      const from = Math.max(0, row - wide);
      const to = Math.min(last, row + wide);
      const fused = new Float64Array(samples * classes);
      for (let member = 0; member <= last; member++) {
        const inside = member >= from && member <= to ? 1 / (to - from + 1) : 0;
        const weight = (1 - share) * (member === last ? 1 : 0) + share * inside;
        if (!weight) continue;
        const start = member * samples * classes;
        for (let n = 0; n < fused.length; n++) fused[n] += weight * probs[start + n];
      }
      return labels.map((_, n) => {
        let best = 0; // the lowest class of equals, as numpy's argmax
        for (let c = 1; c < classes; c++) if (fused[n * classes + c] > fused[n * classes + best]) best = c;
        return best;
      });
    }

    function tally(row, mixed) {
      const count = { ...TALLY };
      labels.forEach((label, n) => {
        const [then, end, now] = [correct[row][n], correct[last][n], mixed[n] === label];
        count.then += then;
        count.forgotten += then && !end;
        count.learned += !then && end;
        count.mixed += now;
        count.back += now && !end;
        count.lost += !now && end;
      });
      return count;
    }

    const final = correct[last].filter(Boolean).length;
    return { ...data, samples, last, final, predicted, correct, mix, tally };
  }

  // ------------------------------------------------------------------ drawing

  // All images in one picture, ink as opacity, for CSS to cut and to tint.
  function sheet(record) {
    const images = bytes(record.images);
    const canvas = document.createElement("canvas");
    canvas.width = 8 * SHEET;
    canvas.height = 8 * Math.ceil(record.samples / SHEET);
    const context = canvas.getContext("2d");
    const picture = context.createImageData(canvas.width, canvas.height);
    images.forEach((ink, place) => {
      const [n, y, x] = [place >> 6, (place >> 3) & 7, place & 7];
      const row = 8 * Math.floor(n / SHEET) + y;
      picture.data[4 * (row * canvas.width + 8 * (n % SHEET) + x) + 3] = ink;
    });
    context.putImageData(picture, 0, 0);
    return canvas.toDataURL();
  }

  function add(parent, name, attributes = {}, text = "") {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return parent.appendChild(element);
  }

  const path = (points) => `M${points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;

  // A plot in pixels of the screen, so that its text keeps its size at every width.
  function plot(svg, record, height, low, high, ticks) {
    const width = Math.max(240, Math.round(svg.getBoundingClientRect().width));
    const [left, right, top, bottom] = [44, 8, 8, 20];
    const x = (epoch) => left + (epoch / (record.epochs - 1)) * (width - left - right);
    const y = (share) => top + ((high - share) / (high - low)) * (height - top - bottom);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    for (const tick of ticks) {
      add(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) });
      add(svg, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, `${Math.round(100 * tick)}%`);
    }
    for (let epoch = 0; epoch < record.epochs; epoch += 10)
      add(svg, "text", { x: x(epoch), y: height - 5, "text-anchor": "middle" }, epoch);
    return { svg, x, y, width, height, top, bottom: height - bottom, step: x(2) - x(0) };
  }

  // ------------------------------------------------------------------ one explorer

  function start(root, record) {
    const { kept, samples, last, labels, correct, predicted } = record;
    const app = root.querySelector(".explorer-app");
    const shown = (name) => [...app.querySelectorAll(`[data-show="${name}"]`)];
    const show = (name, text) => shown(name).forEach((element) => (element.textContent = text));
    const [epochSlider, shareSlider] = ["epoch", "share"].map((name) => app.querySelector(`[data-set="${name}"]`));
    const percent = (count) => `${((100 * count) / samples).toFixed(1)}%`;
    const tell = (name, count) => {
      show(name, count);
      show(`${name}-percent`, percent(count));
    };
    const images = (count) => `${count} image${count === 1 ? "" : "s"}`;

    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const state = { row: kept.indexOf(record.chosen[0]), share: still ? record.chosen[1] : 0 };
    Object.assign(epochSlider, { min: 0, max: last, step: 1, value: state.row });
    shareSlider.value = state.share;
    for (const slider of [epochSlider, shareSlider]) {
      slider.id = `explorer-${slider.dataset.set}`;
      slider.closest(".explorer-control").querySelector("label").htmlFor = slider.id;
    }

    // Tiles stay where they are; those that change most come first.
    const rows = kept.map((_, row) => row);
    const changes = labels.map((_, n) => rows.filter((row) => correct[row][n] !== correct[last][n]).length);
    const order = labels.map((_, n) => n).sort((a, b) => changes[b] - changes[a] || a - b);
    const tiles = new Map();
    for (const [right, name, tag] of [[false, "wrong-tiles", "li"], [true, "right-tiles", "span"]]) {
      const [box] = shown(name);
      for (const n of order.filter((sample) => correct[last][sample] === right)) {
        const item = box.appendChild(document.createElement(tag));
        const tile = item.appendChild(document.createElement("i"));
        tile.style.setProperty("--column", n % SHEET);
        tile.style.setProperty("--row", Math.floor(n / SHEET));
        const parts = { item, tile };
        if (!right) {
          tile.setAttribute("aria-hidden", "true");
          parts.caption = item.appendChild(document.createElement("span"));
          parts.caption.setAttribute("aria-hidden", "true");
          parts.words = item.appendChild(document.createElement("span"));
          parts.words.className = "explorer-said";
        }
        tiles.set(n, parts);
      }
    }
    app.style.setProperty("--sheet", `url("${sheet(record)}")`);
    app.style.setProperty("--columns", SHEET);

    show("wrong", samples - record.final);
    show("right-at-end", record.final);
    show("samples", samples);
    tell("final", record.final);
    show("chosen-epoch", record.chosen[0]);
    show("chosen-share", `${record.chosen[1]}%`);

    const counts = rows.map((row) => record.tally(row, labels));
    let curve = { share: -1, right: [] };
    let frame = {};

    function drawPlots() {
      const least = Math.min(...record.mixed.flat(), ...counts.map((count) => count.then - count.forgotten));
      const low = Math.floor((20 * least) / samples) / 20;
      const ticks = [];
      for (let tick = Math.ceil(10 * low); tick <= 10; tick++) ticks.push(tick / 10);
      const of = (plotted, key) => kept.map((epoch, row) => [plotted.x(epoch), plotted.y(key(counts[row]) / samples)]);

      const upper = plot(shown("accuracy")[0], record, 210, low, 1, ticks);
      const then = of(upper, (count) => count.then);
      const remains = of(upper, (count) => count.then - count.forgotten);
      add(upper.svg, "path", { class: "gap", d: `${path([...then, ...remains.slice().reverse()])}Z` });
      const end = upper.y(record.final / samples);
      add(upper.svg, "line", { class: "last", x1: upper.x(0), x2: upper.x(record.epochs - 1), y1: end, y2: end });
      add(upper.svg, "path", { class: "kept", d: path(remains) });
      add(upper.svg, "path", { class: "then", d: path(then) });
      const line = add(upper.svg, "path", { class: "mix" });

      const most = Math.max(...counts.map((count) => count.forgotten)) / samples;
      const high = Math.max(0.02, Math.ceil(50 * most) / 50);
      const lower = plot(shown("forget")[0], record, 96, 0, high, [0, high / 2, high]);
      const bars = kept.map((epoch, row) => {
        const top = lower.y(counts[row].forgotten / samples);
        return add(lower.svg, "rect", {
          x: lower.x(epoch) - lower.step * 0.36, width: lower.step * 0.72, y: top, height: lower.bottom - top,
        });
      });
      frame = { upper, line, bars, marks: {} };
      frame.marks.rule = add(upper.svg, "line", { class: "rule", y1: upper.top, y2: upper.bottom });
      frame.marks.then = add(upper.svg, "circle", { class: "then", r: 5 });
      frame.marks.mix = add(upper.svg, "path", { class: "mix", d: "M0-7L7 0L0 7L-7 0Z" });
      frame.marks.arrow = add(lower.svg, "path", { class: "rule", d: "M-5-7H5L0 0Z" });
      frame.lower = lower;
    }

    function moveMarks(count) {
      if (curve.share !== state.share) {
        const right = rows.map((row) => {
          const mixed = record.mix(row, state.share / 100);
          return labels.filter((label, n) => mixed[n] === label).length;
        });
        curve = { share: state.share, right };
      }
      const { upper, lower, line, bars, marks } = frame;
      line.setAttribute("d", path(kept.map((epoch, row) => [upper.x(epoch), upper.y(curve.right[row] / samples)])));
      bars.forEach((bar, row) => bar.classList.toggle("here", row === state.row));
      const x = upper.x(kept[state.row]);
      marks.rule.setAttribute("x1", x);
      marks.rule.setAttribute("x2", x);
      marks.then.setAttribute("cx", x);
      marks.then.setAttribute("cy", upper.y(count.then / samples));
      marks.mix.setAttribute("transform", `translate(${x} ${upper.y(count.mixed / samples)})`);
      const top = lower.y(count.forgotten / samples) - 2;
      marks.arrow.setAttribute("transform", `translate(${lower.x(kept[state.row])} ${top})`);
    }

    function moveTiles(mixed) {
      for (const [n, { item, tile, caption, words }] of tiles) {
        const [then, end, now] = [correct[state.row][n], correct[last][n], mixed[n] === labels[n]];
        const name = end ? (then ? "known" : "learned") : then ? "forgotten" : "unknown";
        tile.className = `tile ${name}${now && !end ? " back" : ""}${!now && end ? " lost" : ""}`;
        const [early, late] = [predicted[state.row * samples + n], predicted[last * samples + n]];
        const what = `A ${labels[n]}, read as ${early} after epoch ${kept[state.row]}, ${late} at the end, ${mixed[n]} by the mix`;
        item.title = what;
        if (!caption) continue;
        caption.textContent = now ? `✓ ${mixed[n]}` : `✗ ${mixed[n]}`;
        caption.className = now ? "back" : "";
        words.textContent = `${what}: ${then ? "forgotten" : "wrong both times"}${now ? ", brought back" : ""}.`;
      }
    }

    function lead(count) {
      const epoch = kept[state.row];
      const strong = (name, text) => `<b class="${name}">${text}</b>`;
      const first =
        state.row === last
          ? "This is the final network, the one that one would keep: it is what the others are compared with."
          : `After epoch ${epoch} this network was right about ${strong("forgotten", images(count.forgotten))} ` +
            `that it gets wrong at the end: it ${strong("forgotten", "forgot")} them.`;
      const second = state.share
        ? `Mixed in at ${state.share}%, the epoch ${strong("back", `brings back ${images(count.back)}`)}` +
          ` and loses ${count.lost} others.`
        : "Nothing is mixed in yet.";
      return `${first} ${second}`;
    }

    let speak = 0;
    function update() {
      const epoch = kept[state.row];
      const mixed = record.mix(state.row, state.share / 100);
      const count = record.tally(state.row, mixed);
      show("epoch", epoch);
      show("share", `${state.share}%`);
      tell("right", count.then);
      for (const name of ["forgotten", "learned", "back", "lost", "mixed"]) tell(name, count[name]);
      shown("lead")[0].innerHTML = lead(count);
      epochSlider.setAttribute("aria-valuetext", `epoch ${epoch}`);
      shareSlider.setAttribute("aria-valuetext", `${state.share}%`);
      moveTiles(mixed);
      moveMarks(count);
      const told =
        `Epoch ${epoch}: accuracy ${percent(count.then)}; ${percent(count.forgotten)} of the images forgotten, ` +
        `${percent(count.learned)} learned since; final network ${percent(record.final)}. ` +
        `Mixed in with a share of ${state.share}%: accuracy ${percent(count.mixed)}, ` +
        `${images(count.back)} brought back, ${count.lost} lost.`;
      shown("accuracy")[0].setAttribute("aria-label", `Accuracy by epoch, with a marker at epoch ${epoch}. ${told}`);
      shown("forget")[0].setAttribute(
        "aria-label", `Forget fraction by epoch, with a marker at epoch ${epoch}: ${percent(count.forgotten)}.`);
      shown("right-tiles")[0].setAttribute(
        "aria-label",
        `${images(record.final)} that are right at the end: ${count.learned} of them were wrong after epoch ${epoch}, ` +
          `${count.lost} are wrong in the mix.`);
      clearTimeout(speak);
      speak = setTimeout(() => show("said", told), SETTLED);
    }

    function set(row, share) {
      [state.row, state.share] = [row, share];
      epochSlider.value = row;
      shareSlider.value = share;
      update();
    }

    const play = app.querySelector('[data-press="play"]');
    let timer = 0;
    function stop() {
      clearTimeout(timer); // or interval: they share their numbers
      play.textContent = PLAY;
    }
    function next() {
      if (state.row === last) return stop();
      set(state.row + 1, state.share);
    }
    play.hidden = still;
    play.addEventListener("click", () => {
      const playing = play.textContent !== PLAY;
      touched();
      if (playing) return;
      if (state.row === last) set(0, state.share);
      timer = setInterval(next, PAUSE);
      play.textContent = "■ Stop";
    });
    app.querySelector('[data-press="chosen"]').addEventListener("click", () => {
      touched();
      set(kept.indexOf(record.chosen[0]), record.chosen[1]);
    });
    epochSlider.addEventListener("input", () => {
      touched();
      set(Number(epochSlider.value), state.share);
    });
    shareSlider.addEventListener("input", () => {
      seen.disconnect();
      if (play.textContent === PLAY) stop(); // of the opening; what plays goes on
      set(state.row, Number(shareSlider.value));
    });

    // Once, when it comes into view: the forgotten images, then the mix that brings some back.
    function opening(begun = performance.now()) {
      const passed = performance.now() - begun - OPENING;
      const share = Math.round(record.chosen[1] * Math.min(1, Math.max(0, passed / RAMP)));
      if (share !== state.share) set(state.row, share);
      if (passed < RAMP) timer = setTimeout(() => opening(begun), 40);
      else stop();
    }
    const seen = new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) return;
      seen.disconnect();
      opening();
    }, { threshold: 0.6 });
    function touched() {
      seen.disconnect();
      stop();
    }
    if (!still) seen.observe(shown("wrong-tiles")[0]);

    // The plots are a slider, too, for whoever points at them.
    for (const [svg] of [shown("accuracy"), shown("forget")]) {
      const point = (event) => {
        const { x } = frame.upper;
        const at = event.clientX - svg.getBoundingClientRect().left;
        const near = (row) => Math.abs(x(kept[row]) - at);
        touched();
        set(rows.reduce((best, row) => (near(row) < near(best) ? row : best), 0), state.share);
      };
      svg.addEventListener("pointerdown", point);
      svg.addEventListener("pointermove", (event) => event.buttons && point(event));
    }

    root.classList.add("started");
    app.hidden = false;
    drawPlots();
    update();
    let width = app.clientWidth;
    new ResizeObserver(() => {
      if (app.clientWidth === width) return;
      width = app.clientWidth;
      drawPlots();
      update();
    }).observe(app);
  }

  const record = read(window.fmnExplorer);
  for (const root of document.querySelectorAll("[data-explorer]")) start(root, record);
})();
