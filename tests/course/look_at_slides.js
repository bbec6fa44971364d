// Shows each slide of a deck with all its steps and says what is wrong with it; for test_slides.py.
// Evaluated in a window of 1280 x 720. Formulas are drawn, not written: their letters, and so their
// indices, which may be smaller, are not measured.
async () => {
  const SMALLEST = 18;
  const FOOT = 690; // below it stand the slide's number and the arrows
  const complaints = [];
  const facts = { complaints, slides: 0, formulas: 0 };
  Object.assign(facts, { code: [], alts: [], pictures: [], notes: [], words: [] });

  const visible = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const style = getComputedStyle(each);
      if (style.display === "none" || style.visibility === "hidden") return false;
    }
    return true;
  };

  const lookAtBox = (box, what, complain, bottom = 720) => {
    if (box.bottom > bottom + 1 || box.top < -1) complain(`sticks out below or above: ${what}`);
    if (box.right > 1281 || box.left < -1) complain(`sticks out at the side: ${what}`);
  };

  const lookAtText = (slide, complain) => {
    const walker = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT);
    let letters = 0;
    while (walker.nextNode()) {
      const node = walker.currentNode, words = node.data.trim();
      if (!words || node.parentElement.closest("aside, mjx-container, script, style")) continue;
      if (!visible(node.parentElement)) continue;
      if (!node.parentElement.closest("h1, h2, h3, h4")) letters += words.length;
      const size = parseFloat(getComputedStyle(node.parentElement).fontSize) * Reveal.getScale();
      if (size < SMALLEST - 0.01) complain(`${size} px letters: ${words.slice(0, 40)}`);
      const range = document.createRange();
      range.selectNodeContents(node);
      lookAtBox(range.getBoundingClientRect(), words.slice(0, 40), complain, FOOT);
      const markup = node.parentElement.closest("pre, code");
      if (!markup && /\$|\\\(|\\\[|\\[a-z]{3,}/.test(words)) complain(`math not typeset: ${words}`);
    }
    return letters;
  };

  const lookAtPictures = (slide, complain) => {
    const images = [...slide.querySelectorAll("img")];
    for (const image of images) {
      const { alt, naturalWidth, width } = image;
      if (!naturalWidth || width < 50) complain(`missing picture: ${alt}`);
      if (!alt.trim()) complain("a picture without alt");
      if (width < image.getAttribute("width") - 1) complain(`smaller than drawn: ${alt}`);
      lookAtBox(image.getBoundingClientRect(), alt, complain, FOOT);
      facts.alts.push(alt.trim());
    }
    return images.length;
  };

  const lookAtElements = (slide, complain) => {
    for (const element of slide.querySelectorAll("*")) {
      if (element.closest("aside, mjx-container") && !element.matches("mjx-container")) continue;
      if (!visible(element)) continue;
      lookAtBox(element.getBoundingClientRect(), element.tagName, complain);
      const style = getComputedStyle(element);
      const over = element.scrollHeight > element.clientHeight + 1 && style.overflowY !== "visible";
      const wide = element.scrollWidth > element.clientWidth + 1 && style.overflowX !== "visible";
      if ((over || wide) && element.clientHeight) complain(`has to be scrolled: ${element.tagName}`);
    }
    if (slide.querySelector("mjx-merror, [data-mml-node=merror]")) complain("math with an error");
  };

  for (const slide of Reveal.getSlides()) {
    const { h, v } = Reveal.getIndices(slide);
    Reveal.slide(h, v, 99);
    facts.slides += 1;
    const heading = slide.querySelector("h1, h2, h3, h4")?.textContent ?? "no heading";
    const where = `slide ${facts.slides}, ${heading}`;
    facts.words.push(slide.querySelector(".page").innerText.replace(/\s+/g, " "));
    const complain = (what) => complaints.push(`${where}: ${what}`);
    const letters = lookAtText(slide, complain);
    const pictures = lookAtPictures(slide, complain);
    facts.pictures.push(pictures);
    lookAtElements(slide, complain);
    if (slide.querySelector(".fragment:not(.visible)")) complain("a step that is never shown");
    if (!letters && !pictures) complain("nothing below the heading");
    const all = (selector) => [...slide.querySelectorAll(selector)];
    const texts = (selector) => all(selector).map((each) => each.textContent);
    facts.code.push(...texts(".jp-InputArea-editor pre").map((code) => code.trim()));
    facts.notes.push(...texts("aside.notes"));
    facts.formulas += slide.querySelectorAll("mjx-container").length;
  }
  facts.title = document.title;
  return facts;
}
