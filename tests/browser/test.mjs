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
const SCHEMES = ["light", "dark"];
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

async function inContext(options, work) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(PATIENCE);
  try {
    return await work(context);
  } finally {
    await context.close();
  }
}

// All checks of one page in one colour scheme.
async function look(name, colorScheme, fault = "") {
  return inContext({ colorScheme, viewport: { width: WIDTHS[0], height: 900 } }, async (context) => {
    const query = fault && `?fault=${encodeURIComponent(fault)}`;
    const { page, problems } = await checks.open(context, `${address}/${name}${query}`);
    const { problems: unsound, captions: found } = await checks.content(page, name);
    for (const width of WIDTHS) {
      await page.setViewportSize({ width, height: 900 });
      await page.waitForTimeout(400); // the theme adapts what scrolls 300 ms after a change of width
      const wrong = [...(await checks.width(page)), ...(await checks.letters(page)), ...(await checks.accessibility(page))];
      unsound.push(...wrong.map((problem) => `${width} px: ${problem}`));
    }
    unsound.push(...(await checks.theme(page)));
    return { problems: [...problems, ...unsound], captions: found };
  });
}

async function examine(name, scheme) {
  const { problems, captions: found } = await look(name, scheme);
  captions[name] = found;
  failures.push(...problems.map((problem) => `${name} (${scheme}): ${problem}`));
}

async function weigh(name) {
  await inContext({}, async (context) => {
    const { problems, ...found } = await checks.weigh(await context.newPage(), `${address}/${name}`);
    weights[name] = found;
    failures.push(...problems.map((problem) => `${name}: ${problem}`));
  });
}

// A check that cannot fail checks nothing: faults, put into a sound page, must each be reported.
async function bite(faults) {
  const html = faults.map(({ fault }) => fault).join("");
  const { problems, captions: found } = await look("book/references.html", "light", html);
  const reported = [...problems, ...checks.numbering(found)];
  for (const { fault, says } of faults) {
    if (!reported.some((problem) => problem.includes(says))) failures.push(`no check reports "${says}" for ${fault}`);
  }
}

// What moves on a page: touched and untouched, calm, and without scripts.
async function tryApp(app, name, fault = "") {
  const url = `${address}/${name}${fault && `?fault=${encodeURIComponent(fault)}`}`;
  const found = [];
  for (const [options, check] of app.VISITS) {
    await inContext({ viewport: { width: WIDTHS[0], height: 900 }, ...options }, async (context) => {
      const { page, problems } = await checks.open(context, url);
      found.push(...problems, ...(await check(page)));
    });
    if (found.includes(app.DEAD)) break;
  }
  return found;
}

async function tryExplorer(name, fault) {
  const found = await tryApp(explorer, name, fault);
  if (!fault) return found; // its weight is that of the page, which `weigh` looks at
  const url = `${address}/${name}?fault=${encodeURIComponent(fault)}`;
  const { problems } = await inContext({}, async (context) => checks.weigh(await context.newPage(), url));
  return [...found, ...problems];
}

const tryFilm = (name, fault) => tryApp(film, name, fault);

async function explore(attempt, name) {
  failures.push(...(await attempt(name)).map((problem) => `${name}: ${problem}`));
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

async function biteApp(attempt, name, faults) {
  const html = faults.map(({ fault }) => fault).join("");
  const reported = await attempt(name, html);
  for (const { fault, says } of faults) {
    if (!reported.some((problem) => problem.includes(says))) failures.push(`no check reports "${says}" for ${fault}`);
  }
}

// Those faults together that do not hide each other, the others alone.
function bites(attempt, name, faults) {
  const groups = [faults.filter(({ alone }) => !alone), ...faults.filter(({ alone }) => alone).map((fault) => [fault])];
  return groups.map((group) => () => biteApp(attempt, name, group));
}

async function sheet(fault = "") {
  const url = `${address}/${SHEET}${fault && `?fault=${encodeURIComponent(fault)}`}`;
  return inContext({}, async (context) => {
    const { page, problems } = await checks.open(context, url);
    return [...problems, ...(await checks.sheet(page))];
  });
}

async function printSheet() {
  failures.push(...(await sheet()));
  for (const { fault, says } of SHEET_FAULTS) {
    const reported = await sheet(fault);
    if (!reported.some((problem) => problem.includes(says))) failures.push(`no check reports "${says}" for ${fault}`);
  }
}

async function printBook() {
  const { dead } = await print(browser, address, BOOK);
  failures.push(...dead.map((id) => `the book on paper has a link to ${id}, which is not in it`));
}

async function bitePrint() {
  const fault = encodeURIComponent('<a href="#nowhere">x</a>');
  const { dead } = await print(browser, address, undefined, [`${SHEET}?fault=${fault}`]);
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
  ...pages.map((name) => () => weigh(name)),
  ...pages.flatMap((name) => SCHEMES.map((scheme) => () => examine(name, scheme))),
  () => bite(FAULTS.filter(({ alone }) => !alone)),
  ...FAULTS.filter(({ alone }) => alone).map((fault) => () => bite([fault])),
  ...explorer.EXPLORERS.filter((name) => pages.includes(name)).map((name) => () => explore(tryExplorer, name)),
  () => exploreFile(explorer, explorer.EXPLORERS[0]),
  ...bites(tryExplorer, explorer.EXPLORERS[0], EXPLORER_FAULTS),
  () => explore(tryFilm, film.FILM),
  () => exploreFile(film, film.FILM),
  ...bites(tryFilm, film.FILM, FILM_FAULTS),
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
const [heaviest, { bytes: heavy }] = Object.entries(weights).sort(([, a], [, b]) => b.bytes - a.bytes)[0];
const shows = Object.values(weights).flatMap(({ explorer: time }) => time ?? []);
const seconds = Math.round((Date.now() - began) / 1000);
for (const failure of [...new Set(failures)].sort()) console.error(failure);
const explorers = shows.length ? `; an explorer shows after ${shows.join(" and ")} ms` : "";
console.log(`the heaviest page, ${heaviest}: ${(heavy / 1e6).toFixed(2)} MB${explorers}`);
console.log(
  `${pages.length} pages, ${SCHEMES.length} colour schemes, ${WIDTHS.length} widths, ` +
    `${faults} deliberate faults, ${count} visits: ${new Set(failures).size} problems in ${seconds} s`,
);
process.exit(failures.length ? 1 : 0);
