// Every page of the built book in a real browser: both colour schemes, two widths. Names of pages,
// such as book/intro.html, as arguments look at these alone.
import { join } from "node:path";
import { chromium } from "playwright-core";
import * as checks from "./checks.mjs";
import * as explorer from "./explorer.mjs";
import * as film from "./film.mjs";
import { EXPLORER_FAULTS, FAULTS, FILM_FAULTS, SHEET_FAULTS } from "./faults.mjs";
import { BOOK, print } from "./pdf.mjs";
import { BROWSER, CHAPTERS, HTML, PAGES, PATIENCE, demandBook, serve } from "./site.mjs";

const WORKERS = 3;
const LONGEST = 20 * 60_000; // ms, for the whole book; it takes about 8 minutes
const WIDTHS = [1280, 375];
const SHEET = "book/cheat_sheet.html";
const TERMS = ["forget fraction", "early stopping", "knowledge fusion"];

const pages = process.argv.length > 2 ? process.argv.slice(2) : PAGES;
demandBook();

const began = Date.now();
const { address, close } = await serve();
const browser = await chromium.launch(BROWSER);
const failures = [];
const captions = {};
const weights = {};
const waits = [];

// A page that hangs would hold all others up for ever.
setTimeout(() => {
  const open = browser.contexts().flatMap((context) => context.pages().map((page) => page.url().slice(0, 80)));
  console.error(`not done after ${LONGEST / 60_000} minutes; still open: ${open.join(" ")}`);
  process.exit(1);
}, LONGEST).unref();

async function inContext(options, work) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(PATIENCE);
  try {
    return await work(context);
  } finally {
    await context.close();
  }
}

// A page's path with faults put into it, and its address.
const faulty = (name, faults) => `${name}?fault=${encodeURIComponent(faults.map(({ fault }) => fault).join(""))}`;
const at = (name, faults = []) => `${address}/${faults.length ? faulty(name, faults) : name}`;

// What the checks should have said of faults, and have not.
const unreported = (faults, reported) =>
  faults
    .filter(({ says }) => !reported.some((problem) => problem.includes(says)))
    .map(({ fault, says }) => `no check reports "${says}" for ${fault}`);

// All checks of one page. Colours are looked at in both schemes, all else in one.
async function look(name, faults) {
  return inContext({ colorScheme: "light", viewport: { width: WIDTHS[0], height: 900 } }, async (context) => {
    const { page, problems, loads } = await checks.open(context, at(name, faults));
    const { bytes, problems: heavy } = await checks.weight(loads);
    const { problems: unsound, captions: found } = await checks.content(page, name);
    for (const width of WIDTHS) {
      await page.setViewportSize({ width, height: 900 });
      await page.waitForTimeout(400); // the theme adapts what scrolls 300 ms after a change of width
      const colours = { contrast: width === WIDTHS[0] };
      const wrong = [...(await checks.width(page)), ...(await checks.letters(page)), ...(await checks.accessibility(page, colours))];
      unsound.push(...wrong.map((problem) => `${width} px: ${problem}`));
    }
    await page.setViewportSize({ width: WIDTHS[0], height: 900 });
    unsound.push(...(await checks.theme(page)));
    // Else the colours fade from one scheme to the other while they are looked at.
    await page.addStyleTag({ content: "*, *::before, *::after { transition: none !important; }" });
    await page.emulateMedia({ colorScheme: "dark" });
    await page.locator("html[data-theme=dark]").waitFor();
    const pale = await checks.accessibility(page, { others: false });
    unsound.push(...pale.map((problem) => `dark: ${problem}`));
    return { problems: [...problems, ...heavy, ...unsound], captions: found, bytes };
  });
}

async function examine(name) {
  const { problems, captions: found, bytes } = await look(name);
  captions[name] = found;
  weights[name] = bytes;
  failures.push(...problems.map((problem) => `${name}: ${problem}`));
}

async function time(name) {
  await inContext({}, async (context) => waits.push(await checks.wait(await context.newPage(), at(name))));
}

// A check that cannot fail checks nothing: faults, put into a sound page, must each be reported.
async function bite(faults) {
  const { problems, captions: found } = await look("book/references.html", faults);
  const reported = [...problems, ...checks.numbering(found)];
  failures.push(...unreported(faults, reported));
}

// What moves on a page: touched and untouched, calm, and without scripts; of a faulty one, until
// all that should be said of it is.
async function tryApp(app, name, faults = []) {
  const found = [];
  for (const [options, check] of app.VISITS) {
    await inContext({ viewport: { width: WIDTHS[0], height: 900 }, ...options }, async (context) => {
      const { page, problems } = await checks.open(context, at(name, faults));
      found.push(...problems, ...(await check(page)));
    });
    if (found.includes(app.DEAD) || (faults.length && !unreported(faults, found).length)) break;
  }
  return found;
}

async function explore(app, name) {
  failures.push(...(await tryApp(app, name)).map((problem) => `${name}: ${problem}`));
}

// As the reader has it who downloaded the book.
async function exploreFile(app, name) {
  await inContext({}, async (context) => {
    const { page, problems } = await checks.open(context, `file://${join(HTML, name)}`);
    const [[, check]] = app.VISITS;
    const counted = await check(page);
    failures.push(...[...problems, ...counted].map((problem) => `${name} as a file: ${problem}`));
  });
}

async function biteApp(app, name, faults) {
  failures.push(...unreported(faults, await tryApp(app, name, faults)));
}

// Those faults together that do not hide each other, the others alone.
function bites(app, name, faults) {
  const groups = [faults.filter(({ alone }) => !alone), ...faults.filter(({ alone }) => alone).map((fault) => [fault])];
  return groups.map((group) => () => biteApp(app, name, group));
}

async function sheet(faults) {
  return inContext({}, async (context) => {
    const { page, problems } = await checks.open(context, at(SHEET, faults));
    return [...problems, ...(await checks.sheet(page))];
  });
}

async function printSheet() {
  failures.push(...(await sheet()));
  for (const wrong of SHEET_FAULTS) failures.push(...unreported([wrong], await sheet([wrong])));
}

async function printBook() {
  const { dead } = await print(browser, address, BOOK);
  failures.push(...dead.map((id) => `the book on paper has a link to ${id}, which is not in it`));
}

function biteNothing() {
  if (!unreported([{ fault: "", says: "a fault" }], ["another"]).length) failures.push("a fault that nothing reports is not missed");
}

async function bitePrint() {
  const fault = '<a href="#nowhere">x</a>';
  const { dead } = await print(browser, address, undefined, [faulty(SHEET, [{ fault }])]);
  if (dead.length !== 1) failures.push(`of one link that leads nowhere, ${dead.length} are reported`);
}

async function find(term) {
  await inContext({}, async (context) => {
    const problems = await checks.search(await context.newPage(), address, term);
    failures.push(...problems);
  });
}

async function findNothing() {
  await inContext({}, async (context) => {
    const problems = await checks.search(await context.newPage(), address, "xyzzy");
    if (!problems.length) failures.push("the check of the search finds what is in no page");
  });
}

const faults = [FAULTS, EXPLORER_FAULTS, FILM_FAULTS, SHEET_FAULTS].flat().length;
const jobs = [
  ...(pages === PAGES ? [printBook] : []), // the longest first
  bitePrint,
  biteNothing,
  ...pages.map((name) => () => examine(name)),
  () => bite(FAULTS.filter(({ alone }) => !alone)),
  ...FAULTS.filter(({ alone }) => alone).map((fault) => () => bite([fault])),
  ...explorer.EXPLORERS.filter((name) => pages.includes(name)).flatMap((name) => [() => time(name), () => explore(explorer, name)]),
  () => exploreFile(explorer, explorer.EXPLORERS[0]),
  ...bites(explorer, explorer.EXPLORERS[0], EXPLORER_FAULTS),
  () => explore(film, film.FILM),
  () => exploreFile(film, film.FILM),
  ...bites(film, film.FILM, FILM_FAULTS),
  printSheet,
  ...TERMS.map((term) => () => find(term)),
  findNothing,
];
const count = jobs.length;
const work = async () => {
  for (let job = jobs.shift(); job; job = jobs.shift()) await job();
};
await Promise.all(Array.from({ length: WORKERS }, work));
if (pages === PAGES) failures.push(...checks.numbering(CHAPTERS.flatMap((name) => captions[name])));

await browser.close();
close();
const [heaviest, heavy] = Object.entries(weights).sort(([, a], [, b]) => b - a)[0];
const seconds = Math.round((Date.now() - began) / 1000);
for (const failure of [...new Set(failures)].sort()) console.error(failure);
const explorers = waits.length ? `; an explorer shows after ${waits.join(" and ")} ms` : "";
console.log(`the heaviest page, ${heaviest}: ${(heavy / 1e6).toFixed(2)} MB${explorers}`);
console.log(
  `${pages.length} pages, 2 colour schemes, ${WIDTHS.length} widths, ` +
    `${faults} deliberate faults, ${count} visits: ${new Set(failures).size} problems in ${seconds} s`,
);
process.exit(failures.length ? 1 : 0);
