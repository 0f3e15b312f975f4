// What is wrong with the film of the decision regions. What it should count stands in the page's own
// data, where fmnlib wrote it.
import { gzipSync } from "node:zlib";
import { keyboard, scriptsOff, sizes } from "./explorer.mjs";

export const FILM = "notebooks/01_local_overfitting.html";
export const DEAD = "the film does not start";
const HEAVY = 300_000; // bytes of the film's own files, as a server sends them

async function film(page) {
  if (!(await page.locator(".film .explorer-app").isVisible())) return [DEAD];
  const drawn = await page.evaluate(count);
  return [...drawn, ...(await keyboard(page, "epoch")), ...(await play(page)), ...(await sizes(page))];
}

// Every epoch: what the page says, and the cells that it draws. Runs in the browser.
function count() {
  const problems = [];
  const data = window.fmnFilm;
  const app = document.querySelector(".film .explorer-app");
  const slider = app.querySelector('[data-set="epoch"]');
  const text = (name) => app.querySelector(`[data-show="${name}"]`).textContent;
  const percent = (number) => `${((100 * number) / data.side ** 2).toFixed(1)}%`;
  const path = (name) => app.querySelector(`.film-map path.${name}`).getAttribute("d");
  const area = (name) => [...path(name).matchAll(/h(\d+)v1/g)].reduce((sum, [, wide]) => sum + Number(wide), 0);
  const expect = (what, is, should) => {
    if (is !== should) problems.push(`${what}: ${is} in place of ${should}`);
  };
  const bytes = Uint8Array.from(atob(data.predicted), (letter) => letter.charCodeAt(0));
  const row = data.side ** 2 / 8;
  const ones = (epoch) =>
    bytes.slice(epoch * row, (epoch + 1) * row).reduce((sum, byte) => sum + byte.toString(2).replaceAll("0", "").length, 0);
  expect("epochs of the slider", Number(slider.max), data.epochs - 1);
  const [lowest, middle] = path("true").slice(1).split("L").map((point) => Number(point.split(" ")[1]));
  if (!(middle > lowest)) problems.push("the true border is not drawn");
  for (let epoch = 0; epoch < data.epochs; epoch++) {
    slider.value = epoch;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    expect(`epoch ${epoch}: the epoch shown`, text("epoch"), String(epoch));
    for (const name of ["right", "lost", "forgotten"])
      expect(`epoch ${epoch}: area ${name}`, text(name), percent(data[name][epoch]));
    expect(`epoch ${epoch}: cells tinted`, area("gone"), data.lost[epoch]);
    expect(`epoch ${epoch}: cells of the upper region`, area("one"), ones(epoch));
  }
  return problems.slice(0, 6);
}

// It moves when played, to the end; and not after it was stopped.
async function play(page) {
  const epoch = () => page.locator('[data-show="epoch"]').first().textContent();
  const button = page.locator('[data-press="play"]');
  await button.click();
  const begun = Number(await epoch());
  const moved = page.waitForFunction(
    (from) => Number(document.querySelector('[data-show="epoch"]').textContent) > from, begun, { timeout: 5000 });
  if (!(await moved.then(() => true, () => false))) return ["the film does not play"];
  await button.click();
  const stopped = await epoch();
  await page.waitForTimeout(800);
  return (await epoch()) === stopped ? [] : ["the film plays on after a pause"];
}

async function still(page) {
  const play = await page.locator('[data-press="play"]').isVisible();
  return play ? ["it plays although motion is to be reduced"] : [];
}

// Nobody pressed play.
async function untouched(page) {
  const epoch = () => page.locator('[data-show="epoch"]').first().textContent();
  const before = await epoch();
  await page.locator(".film").scrollIntoViewIfNeeded();
  await page.waitForTimeout(800);
  return before === (await epoch()) ? [] : ["the film plays by itself"];
}

async function weight(page) {
  const loads = [];
  page.on("response", (response) => response.url().includes("/film/") && loads.push(response));
  page.on("framenavigated", () => loads.splice(0)); // those of the page before the reload are gone
  await page.reload({ waitUntil: "load" });
  let total = 0;
  for (const response of loads) total += gzipSync(await response.body()).length;
  return 0 < total && total < HEAVY ? [] : [`the film weighs ${Math.round(total / 1000)} kB`];
}

export const VISITS = [
  [{}, film],
  [{}, untouched],
  [{}, weight],
  [{ reducedMotion: "reduce" }, still],
  [{ javaScriptEnabled: false }, scriptsOff],
];
