// The film of the decision regions. It reads window.fmnFilm, which book/film.py writes, and counts
// what it shows as fmnlib.scores does.
(() => {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";
  const PLAY = "▶ Play";
  const PAUSE = "❚❚ Pause";
  const FRAME = 120; // ms of an epoch while it plays
  const SETTLED = 600; // ms without a change, after which the change is spoken
  const DOT = 0.45; // of a training point, in cells

  function bits(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return (n) => (bytes[n >> 3] >> (7 - (n & 7))) & 1;
  }

  // What is right after each epoch, and what was right before and no longer is.
  function read(data) {
    const { epochs, side } = data;
    const places = side * side;
    const [predicted, classes] = [bits(data.predicted), bits(data.classes)];
    const region = (epoch, n) => predicted(epoch * places + n);
    const all = Array.from({ length: places }, (_, n) => n);
    const right = Array.from({ length: epochs }, (_, epoch) => all.map((n) => region(epoch, n) === classes(n)));
    const ever = all.map(() => false);
    const lost = right.map((now) => {
      const gone = now.map((is, n) => ever[n] && !is);
      now.forEach((is, n) => (ever[n] ||= is));
      return gone;
    });
    const count = (mask) => mask.filter(Boolean).length;
    const end = right.at(-1);
    const counts = right.map((now, epoch) => ({
      right: count(now),
      lost: count(lost[epoch]),
      forgotten: count(now.map((is, n) => is && !end[n])),
    }));
    return { ...data, places, last: epochs - 1, region, lost, counts };
  }

  function add(parent, name, attributes = {}, text = "") {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return parent.appendChild(element);
  }

  // Cells as a path, those side by side in one piece.
  function cells(side, inside) {
    let path = "";
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        if (!inside(y * side + x)) continue;
        const start = x;
        while (x + 1 < side && inside(y * side + x + 1)) x++;
        path += `M${start} ${y}h${x + 1 - start}v1h-${x + 1 - start}z`;
      }
    }
    return path;
  }

  function edges(side, region) {
    let path = "";
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        const here = region(y * side + x);
        if (x + 1 < side && region(y * side + x + 1) !== here) path += `M${x + 1} ${y}v1`;
        if (y + 1 < side && region((y + 1) * side + x) !== here) path += `M${x} ${y + 1}h1`;
      }
    }
    return path;
  }

  function start(root, film) {
    const { side, last, counts } = film;
    const app = root.querySelector(".explorer-app");
    const shown = (name) => [...app.querySelectorAll(`[data-show="${name}"]`)];
    const show = (name, text) => shown(name).forEach((element) => (element.textContent = text));
    const percent = (count) => `${((100 * count) / film.places).toFixed(1)}%`;
    const [map] = shown("map");
    const part = (name) => map.querySelector(`path.${name}`);
    const slider = app.querySelector('[data-set="epoch"]');
    const play = app.querySelector('[data-press="play"]');
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    let [epoch, timer, speak, frame] = [last, 0, 0, {}];

    Object.assign(slider, { min: 0, max: last, step: 1, value: last, id: "film-epoch" });
    slider.closest(".explorer-control").querySelector("label").htmlFor = slider.id;
    const across = (n) => (n * side) / (film.border.length - 1);
    part("true").setAttribute("d", `M${film.border.map((y, n) => `${across(n)} ${y}`).join("L")}`);
    for (const [x, y, label, wrong] of film.points) {
      const points = map.querySelector(".points");
      if (label) add(points, "path", { class: "at-one", d: `M${x - DOT} ${y - DOT}h${2 * DOT}L${x} ${y + DOT}z` });
      else add(points, "circle", { class: "at-zero", cx: x, cy: y, r: DOT });
      if (wrong) add(points, "rect", { class: "box", x: x - 1, y: y - 1, width: 2, height: 2 });
    }

    function drawPlot() {
      const [svg] = shown("accuracy");
      const width = Math.max(240, Math.round(svg.getBoundingClientRect().width));
      const [height, left, right, top, bottom] = [200, 44, 8, 8, 20];
      const kept = counts.map((count) => count.right - count.forgotten);
      const low = Math.floor((20 * Math.min(...kept)) / film.places) / 20;
      const x = (n) => left + (n / last) * (width - left - right);
      const y = (share) => top + ((1 - share) / (1 - low)) * (height - top - bottom);
      const line = (values) => values.map((count, n) => `${x(n).toFixed(1)} ${y(count / film.places).toFixed(1)}`);
      const path = (points) => `M${points.join("L")}`;
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.style.height = `${height}px`;
      for (let tick = Math.round(20 * low); tick <= 20; tick++) {
        const at = y(tick / 20);
        add(svg, "line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at });
        add(svg, "text", { x: left - 6, y: at + 4, "text-anchor": "end" }, `${5 * tick}%`);
      }
      for (let n = 0; n <= last; n += 20) add(svg, "text", { x: x(n), y: height - 5, "text-anchor": "middle" }, n);
      const [then, remains] = [line(counts.map((count) => count.right)), line(kept)];
      add(svg, "path", { class: "gap", d: `${path([...then, ...remains.slice().reverse()])}Z` });
      add(svg, "path", { class: "kept", d: path(remains) });
      add(svg, "path", { class: "then", d: path(then) });
      const rule = add(svg, "line", { class: "rule", y1: top, y2: height - bottom });
      const dot = add(svg, "circle", { class: "then", r: 5 });
      frame = { x, y, rule, dot };
    }

    function update() {
      const count = counts[epoch];
      show("epoch", epoch);
      for (const name of ["right", "lost", "forgotten"]) show(name, percent(count[name]));
      const region = (n) => film.region(epoch, n);
      part("one").setAttribute("d", cells(side, region));
      part("edge").setAttribute("d", edges(side, region));
      part("gone").setAttribute("d", cells(side, (n) => film.lost[epoch][n]));
      const at = frame.x(epoch);
      frame.rule.setAttribute("x1", at);
      frame.rule.setAttribute("x2", at);
      frame.dot.setAttribute("cx", at);
      frame.dot.setAttribute("cy", frame.y(count.right / film.places));
      const told =
        `After ${epoch === last ? "the last epoch" : `epoch ${epoch}`} the network is right on ${percent(count.right)} ` +
        `of the area. ${percent(count.lost)} was right after an earlier epoch and is wrong now.`;
      shown("lead")[0].textContent = told;
      slider.setAttribute("aria-valuetext", `epoch ${epoch}`);
      map.setAttribute("aria-label", `Map of the two regions, their border and the true border. ${told}`);
      shown("accuracy")[0].setAttribute("aria-label", `Share of the area that is right by epoch, with a marker. ${told}`);
      clearTimeout(speak);
      const more = `${percent(count.forgotten)} is right now and wrong at the end.`;
      speak = setTimeout(() => show("said", `Epoch ${epoch}. ${told} ${more}`), SETTLED);
    }

    function set(number) {
      epoch = number;
      slider.value = number;
      update();
    }

    function stop() {
      clearInterval(timer);
      timer = 0;
      play.textContent = PLAY;
    }
    stop();
    play.hidden = still;
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (epoch === last) set(0);
      timer = setInterval(() => (epoch === last ? stop() : set(epoch + 1)), FRAME);
      play.textContent = PAUSE;
    });
    slider.addEventListener("input", () => {
      stop();
      set(Number(slider.value));
    });

    app.hidden = false;
    drawPlot();
    update();
    let width = app.clientWidth;
    new ResizeObserver(() => {
      if (app.clientWidth === width) return;
      width = app.clientWidth;
      drawPlot();
      update();
    }).observe(app);
  }

  const film = read(window.fmnFilm);
  for (const root of document.querySelectorAll("[data-film]")) start(root, film);
})();
