// What is wrong with the forgetting explorer of a page. What it should count stands in the page's own
// data, where fmnlib wrote it.
import { PATIENCE } from "./site.mjs";

export const EXPLORERS = ["book/intro.html", "notebooks/00_quickstart.html"];
export const DEAD = "the explorer does not start";
const SMALL = { 1200: 9, 375: 7 }; // px of the smallest text, by width of the window

const at = (page, name) => page.locator(`[data-set="${name}"]`);
const shown = (page, name) => page.locator(`[data-show="${name}"]`).first();

// Sliders, numbers, tiles, marks, keyboard, speech and sizes.
export async function explorer(page) {
  if (!(await page.locator(".explorer-app").isVisible())) return [DEAD];
  const problems = await page.evaluate(count);
  for (const name of ["epoch", "share"]) problems.push(...(await keyboard(page, name)));
  problems.push(...(await page.evaluate(cues)));
  return [...problems, ...(await sizes(page))];
}

export async function sizes(page) {
  const problems = [];
  for (const [width, least] of Object.entries(SMALL)) {
    await page.setViewportSize({ width: Number(width), height: 900 });
    await page.waitForTimeout(400);
    const small = await page.evaluate(smallest);
    if (small < least) problems.push(`text of ${small} px in a window of ${width} px`);
  }
  return problems;
}

// Every epoch at every share that fmnlib counted. Runs in the browser.
function count() {
  const [problems, marks] = [[], []];
  const data = window.fmnExplorer;
  const app = document.querySelector(".explorer-app");
  const [epoch, share] = ["epoch", "share"].map((name) => app.querySelector(`[data-set="${name}"]`));
  const text = (name) => app.querySelector(`[data-show="${name}"]`).textContent;
  const tiles = (selector) => app.querySelectorAll(`.explorer-tiles .tile${selector}`).length;
  const samples = data.labels.length;
  const final = data.right.at(-1);
  const percent = (number) => `${((100 * number) / samples).toFixed(1)}%`;
  const steps = data.mixed[0].length - 1;
  let before = -1;
  const move = (slider, value) => {
    slider.value = value;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const expect = (what, is, should) => {
    if (is !== should) problems.push(`${what}: ${is} in place of ${should}`);
  };
  if (Number(epoch.max) !== data.kept.length - 1) problems.push("the slider does not go over the kept epochs");
  const sum = (where, ...terms) => {
    const [start, more, less, end] = terms.map((name) => Number(text(name)));
    expect(`${where}: the sum up to ${terms.at(-1)}`, start + more - less, end);
  };
  expect("accuracy of the final network", text("final-percent"), percent(final));
  for (const [row, number] of data.kept.entries()) {
    for (let step = 0; step <= steps; step++) {
      move(epoch, row);
      move(share, (100 * step) / steps);
      const where = `epoch ${number}, share ${share.value}%`;
      expect(`${where}: the epoch shown`, text("epoch"), String(number));
      expect(`${where}: accuracy after the epoch`, text("right-percent"), percent(data.right[row]));
      expect(`${where}: forgotten`, text("forgotten-percent"), percent(data.forgotten[row]));
      expect(`${where}: learned`, text("learned-percent"), percent(data.learned[row]));
      expect(`${where}: accuracy of the mix`, text("mixed-percent"), percent(data.mixed[row][step]));
      sum(where, "right", "learned", "forgotten", "final");
      sum(where, "final", "back", "lost", "mixed");
      expect(`${where}: tiles forgotten`, tiles(".forgotten"), data.forgotten[row]);
      expect(`${where}: tiles learned`, tiles(".learned"), data.learned[row]);
      expect(`${where}: tiles that the mix gets right`, final + tiles(".back") - tiles(".lost"), data.mixed[row][step]);
    }
    const mark = app.querySelector("circle.then");
    const x = Number(mark?.getAttribute("cx") ?? before);
    if (!(x > before)) marks.push(`the marker does not move to epoch ${number}`);
    before = x;
  }
  const line = () => app.querySelector("path.mix").getAttribute("d");
  const drawn = line();
  move(share, 50);
  if (line() === drawn) marks.push("the curve of the mix does not follow the share");
  return [...marks.slice(0, 2), ...problems.slice(0, 6)];
}

export async function keyboard(page, name) {
  const problems = [];
  const slider = at(page, name);
  if (!(await slider.evaluate((element) => element.labels.length))) problems.push(`the slider of the ${name} has no label`);
  await slider.focus();
  await page.keyboard.press("Home");
  const value = () => slider.evaluate((element) => Number(element.value));
  const first = [await value(), await shown(page, name).textContent()];
  await page.keyboard.press("ArrowRight");
  const second = [await value(), await shown(page, name).textContent()];
  if (first[0] !== 0 || second[0] !== 1 || first[1] === second[1])
    problems.push(`the keyboard does not move the ${name}: ${first} and ${second}`);
  const told = await slider.getAttribute("aria-valuetext");
  if (!told?.includes(second[1])) problems.push(`the slider of the ${name} says ${told} and shows ${second[1]}`);
  const number = `${name === "epoch" ? "Epoch " : "share of "}${second[1]}`;
  const said = page.locator('.explorer [aria-live="polite"]').filter({ hasText: number });
  await said.waitFor({ state: "attached", timeout: 5000 }).catch(() => problems.push(`nothing is said of ${number}`));
  return problems;
}

// What tells the tiles apart besides their colour. Runs in the browser.
function cues() {
  const problems = [];
  const style = (name) => getComputedStyle(document.querySelector(`.explorer-key .tile.${name}`)).outlineStyle;
  const frames = ["known", "learned", "forgotten"].map(style);
  if (new Set(frames).size < 3) problems.push(`nothing but colour tells the tiles apart: frames are ${frames}`);
  for (const item of document.querySelectorAll(".explorer-tiles li")) {
    const back = item.querySelector(".tile").classList.contains("back");
    if (back !== item.textContent.startsWith("✓")) problems.push(`no mark on an image: ${item.textContent}`);
  }
  return problems.slice(0, 2);
}

// The smallest text that is seen, in pixels of the screen. Runs in the browser.
function smallest() {
  const seen = [...document.querySelectorAll(".explorer-app *")].filter(
    (element) =>
      [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim()) &&
      element.getClientRects().length && !element.closest(".explorer-said"));
  const size = (element) => {
    const scale = element instanceof SVGElement ? element.getScreenCTM().a : 1;
    return Number.parseFloat(getComputedStyle(element).fontSize) * scale;
  };
  return Math.round(10 * Math.min(...seen.map(size))) / 10;
}

// Nobody has touched it: first nothing is mixed in, then what Knowledge Fusion chose.
async function opening(page) {
  const share = () => shown(page, "share").textContent();
  const problems = (await share()) === "0%" ? [] : [`it begins with a share of ${await share()}`];
  await page.locator('[data-show="wrong-tiles"]').scrollIntoViewIfNeeded();
  const chosen = await page.evaluate(() => window.fmnExplorer.chosen[1]);
  const there = page.locator('[data-show="share"]').first().filter({ hasText: `${chosen}%` });
  await there.waitFor({ timeout: PATIENCE / 10 }).catch(() => problems.push("nothing is mixed in by itself"));
  return problems;
}

async function calm(page) {
  const chosen = await page.evaluate(() => window.fmnExplorer.chosen[1]);
  const share = await shown(page, "share").textContent();
  const problems = share === `${chosen}%` ? [] : [`where motion is reduced, it begins with a share of ${share}`];
  if (await page.locator('[data-press="play"]').isVisible()) problems.push("it plays although motion is to be reduced");
  return problems;
}

export async function scriptsOff(page) {
  const picture = page.locator(".explorer-still img");
  const problems = [];
  if (await page.locator(".explorer-app").isVisible()) problems.push("without scripts there are controls that do nothing");
  const box = (await picture.isVisible()) && (await picture.boundingBox());
  if (!box || box.width < 200 || box.height < 80) problems.push("without scripts there is no picture");
  if (((await picture.getAttribute("alt")) ?? "").length < 20) problems.push("the picture has no description");
  return problems;
}

export const VISITS = [
  [{}, explorer],
  [{}, opening],
  [{ reducedMotion: "reduce" }, calm],
  [{ javaScriptEnabled: false }, scriptsOff],
];
