// Lays the cells of a notebook out on slides of 1280 x 720, none of which has to be scrolled.
//
// A slide of the notebook is taken apart into blocks: heading, paragraph, item of a list, code,
// print, picture, table. What does not fit on one slide goes on on the next, under the heading
// again. Where to break is chosen for the whole slide at once, as TeX breaks a paragraph: each way
// to break has a cost, and the cheapest wins. Pictures take what room is left. Nothing is cut off:
// a block that is higher than a slide is left to stick out, and the slides' test reports it.

const PAGE = { width: 1216, height: 660 }; // inside of a slide; the numbers are those of slides.css
const SIZES = { "": { gap: 14, cost: 0 }, tight: { gap: 10, cost: 190 } };
const MOST_LINES = 20; // of a print; longer ones are cut
const SIZES_OF_CODE = [22, 20, 18]; // px, and of prints and tables

/** Replaces each slide in `root` by one or more that fit. `root` has to be laid out, unscaled. */
function fitSlides(root) {
  const slides = root.querySelectorAll("section:not(:has(section))");
  let heading = null; // the last one so far
  for (const slide of slides) {
    const { blocks, notes } = takeApart(slide);
    const pages = cheapest(slide, blocks, heading ?? blocks[0].node);
    for (const page of pages) {
      page.again = page.blocks[0].kind === "heading" ? null : heading;
      heading = page.blocks.findLast((block) => block.kind === "heading")?.node ?? heading;
    }
    slide.replaceWith(...pages.map((page) => build(page, slide, notes)));
  }
}

/** The blocks of a slide in order, and its speaker notes, each with the block that it follows. */
function takeApart(slide) {
  const blocks = [];
  const notes = [];
  const cells = [...slide.querySelectorAll(".jp-Cell, aside.notes")];
  for (const cell of cells.filter((each) => !each.parentElement.closest("aside.notes"))) {
    if (cell.matches("aside.notes")) {
      notes.push({ node: cell, after: blocks.at(-1) });
      continue;
    }
    const fragment = cell.closest(".fragment");
    const title = Boolean(cell.querySelector("h1"));
    for (const node of parts(cell)) {
      blocks.push({ node, cell, title, fragment, kind: kindOf(node) });
    }
  }
  return { blocks, notes };
}

/** The nodes of a cell that stay whole; lists fall into single items, long prints into pieces. */
function parts(cell) {
  const found = cell.querySelectorAll(
    ":scope .jp-MarkdownOutput > *, :scope .jp-InputArea-editor, :scope .jp-OutputArea-output",
  );
  return [...found].flatMap((node) => {
    if (node.matches("ul, ol")) return items(node);
    return node.matches(".jp-RenderedText") ? pieces(node) : [node];
  });
}

function pieces(print) {
  const lines = print.textContent.trimEnd().split("\n");
  if (lines.length <= MOST_LINES) return [print];
  const starts = [...lines.keys()].filter((index) => index % MOST_LINES === 0);
  return starts.map((start) => {
    const piece = print.cloneNode(true);
    piece.querySelector("pre").textContent = lines.slice(start, start + MOST_LINES).join("\n");
    return piece;
  });
}

function items(list) {
  return [...list.children].map((item, index) => {
    const single = list.cloneNode(false);
    if (list.matches("ol")) single.start = list.start + index;
    single.append(item);
    return single;
  });
}

function kindOf(node) {
  if (node.matches("h1, h2, h3, h4")) return "heading";
  if (node.matches("ul, ol")) return "item";
  if (node.matches(".jp-InputArea-editor")) return "code";
  if (node.matches(".jp-RenderedImage")) return "picture";
  if (node.matches(".jp-OutputArea-output")) return "print";
  return node.matches("table") ? "table" : "text";
}

/** The pages of the cheaper layout: with letters as they should be, or a little smaller. */
function cheapest(slide, blocks, heading) {
  const layouts = Object.entries(SIZES).map(([size, { gap, cost }]) => {
    const ruler = slide.cloneNode(false);
    ruler.className = `ruler ${size} ${titleClass(blocks)}`;
    const again = repeat(heading);
    const page = ruler.appendChild(element("div", "page"));
    page.append(again, ...blocks.map((block) => block.node));
    slide.before(ruler);
    const measured = blocks.map(measure);
    const found = paginate(measured, again.offsetHeight + gap, gap);
    ruler.remove();
    found.pages.forEach((page) => (page.size = size));
    return { pages: found.pages, cost: found.cost + cost };
  });
  return layouts[0].cost <= layouts[1].cost ? layouts[0].pages : layouts[1].pages;
}

/** The block with its least and its most height on a slide, and the letters that it needs. */
function measure(block) {
  const { node, kind } = block;
  node.classList.remove("wrap");
  if (kind === "picture") {
    const image = node.querySelector("img");
    const ratio = image.naturalHeight / image.naturalWidth;
    const natural = Math.min(image.naturalHeight, PAGE.height - 70); // 70: the heading, again
    const largest = Math.min(PAGE.width * ratio, PAGE.height);
    return { ...block, least: natural, most: Math.max(natural, largest) };
  }
  const fixed = node.matches("pre, table") ? node : node.querySelector("pre, table");
  const size = fixed && fitLetters(node, fixed);
  const height = node.getBoundingClientRect().height;
  return { ...block, size, wrap: node.matches(".wrap"), least: height, most: height };
}

/** Sets the largest letters at which no line has to be wrapped and no table is too high. */
function fitLetters(node, fixed) {
  const sizes = node.closest(".tight") ? SIZES_OF_CODE.slice(-1) : SIZES_OF_CODE;
  const table = fixed.matches("table");
  const set = (size) => node.style.setProperty("--code-size", `${size}px`);
  const fits = (size) => {
    set(size);
    return table ? fixed.offsetHeight < 0.7 * PAGE.height : fixed.scrollWidth <= fixed.clientWidth;
  };
  let size = sizes.find(fits);
  if (!size) {
    size = table ? sizes.at(-1) : (sizes.at(-2) ?? sizes.at(-1));
    node.classList.toggle("wrap", !table);
    set(size);
  }
  return size;
}

/** The cheapest way to break the blocks into pages; found from the last block backwards. */
function paginate(blocks, again, gap) {
  const best = [{ cost: 0, pages: [] }]; // best[k]: for the last k blocks
  for (let from = blocks.length - 1; from >= 0; from--) {
    let least = blocks[from].kind === "heading" ? 0 : again;
    let most = least;
    let cheapest = null;
    for (let to = from; to < blocks.length; to++) {
      least += blocks[to].least + (to > from ? gap : 0);
      most += blocks[to].most + (to > from ? gap : 0);
      if (least > PAGE.height && to > from) break;
      const next = best[blocks.length - 1 - to];
      const cost = next.cost + pageCost(most) + breakCost(blocks[to], blocks[to + 1]);
      if (!cheapest || cost < cheapest.cost) {
        const page = { blocks: blocks.slice(from, to + 1), room: PAGE.height - least };
        cheapest = { cost, pages: [page, ...next.pages] };
      }
    }
    best.push(cheapest);
  }
  return best.at(-1);
}

function pageCost(height) {
  const empty = Math.max(0, 1 - height / PAGE.height);
  return 100 + 150 * empty ** 2;
}

/** The title page is that with the notebook's own heading; it is laid out differently. */
function titleClass(blocks) {
  return blocks.some((block) => block.title) ? "title" : "";
}

/** What it costs to turn the page between two blocks: how much one needs the other. */
function breakCost(before, after) {
  if (!after) return 0;
  if (before.title && !after.title) return -1e3; // the title stands alone
  if (before.kind === "heading") return 1e6;
  if (before.kind === "text" && before.node.textContent.trim().endsWith(":")) return 90;
  if (after.kind === "text") return before.cell === after.cell ? 12 : 8;
  if (after.kind === "heading") return 0;
  if (after.kind === "picture") return 60;
  if (before.cell === after.cell) return after.kind === "item" ? 20 : 15; // code and its result
  return before.kind === "text" ? 25 : 5;
}

/** A page as a section of the deck, with the attributes of the slide that it comes from. */
function build(page, slide, notes) {
  const section = slide.cloneNode(false);
  section.className = `${page.size} ${titleClass(page.blocks)}`;
  const inside = section.appendChild(element("div", "page"));
  if (page.again && !titleClass(page.blocks)) inside.append(repeat(page.again));
  const pictures = page.blocks.filter((block) => block.kind === "picture");
  for (const block of page.blocks) {
    const { node } = block;
    inside.append(node);
    if (block.size) node.style.setProperty("--code-size", `${block.size}px`);
    node.classList.toggle("wrap", Boolean(block.wrap));
    if (block.kind === "picture") {
      const height = Math.min(block.most, block.least + page.room / pictures.length);
      node.querySelector("img").style.height = `${Math.floor(height)}px`;
    }
  }
  showInSteps(page.blocks);
  section.append(speakerNotes(page.blocks, notes));
  return section;
}

/** What is shown later in the notebook's slide is so here; a page never starts empty. */
function showInSteps(blocks) {
  const steps = [...new Set(blocks.map((block) => block.fragment))];
  const first = blocks[0].kind === "heading" ? blocks[1]?.fragment : blocks[0].fragment;
  for (const { node, fragment } of blocks) {
    if (!fragment || fragment === first) continue;
    node.classList.add("fragment");
    node.dataset.fragmentIndex = steps.indexOf(fragment);
  }
}

/** Notes stay with what they follow; what a picture shows stands there in words. */
function speakerNotes(blocks, notes) {
  const aside = element("aside", "notes");
  for (const { node, kind } of blocks) {
    if (kind === "picture") {
      const words = aside.appendChild(element("p"));
      words.textContent = `Picture: ${node.querySelector("img").alt}`;
    }
  }
  for (const { node, after } of notes) {
    if (!after || blocks.some((block) => block.node === after.node)) {
      aside.append(...node.querySelectorAll(".jp-MarkdownOutput > *"));
    }
  }
  return aside;
}

function repeat(heading) {
  const again = element("h2", "again");
  again.innerHTML = heading.innerHTML;
  return again;
}

function element(name, className = "") {
  return Object.assign(document.createElement(name), { className });
}
