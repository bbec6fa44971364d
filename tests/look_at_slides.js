// Shows each slide of a deck with all its steps and says what is wrong with it; for test_slides.py.
// Evaluated in a window of 1280 x 720. Formulas are drawn, not written: their letters, and so their
// indices, which may be smaller, are not measured.
async () => {
  const SMALLEST = 18;
  const FOOT = 690; // below it stand the slide's number and the arrows
  const complaints = [];
  const facts = { complaints, code: [], alts: [], pictures: [], notes: [], words: [], formulas: 0, slides: 0 };

  const visible = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const style = getComputedStyle(each);
      if (style.display === "none" || style.visibility === "hidden" || style.opacity === "0") return false;
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
      if (!markup && /\$|\\\(|\\\[|\\[a-z]{3,}/.test(words)) complain(`math not typeset: ${words.slice(0, 40)}`);
    }
    return letters;
  };

  const lookAtPictures = (slide, complain) => {
    const images = [...slide.querySelectorAll("img")];
    for (const image of images) {
      if (!image.complete || !image.naturalWidth || image.width < 50) complain(`missing picture: ${image.alt}`);
      if (!image.alt.trim()) complain("a picture without alt");
      lookAtBox(image.getBoundingClientRect(), image.alt, complain, FOOT);
      if (image.width < image.getAttribute("width") - 1) complain(`smaller than drawn: ${image.alt}`);
      facts.alts.push(image.alt.trim());
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
      if (element.clientHeight && (over || wide)) complain(`has to be scrolled: ${element.className}`);
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
    if (!letters && !pictures) complain("nothing below the heading");
    facts.code.push(...[...slide.querySelectorAll(".jp-InputArea-editor pre")].map((pre) => pre.innerText.trim()));
    facts.notes.push(...[...slide.querySelectorAll("aside.notes")].map((notes) => notes.textContent));
    facts.formulas += slide.querySelectorAll("mjx-container").length;
  }
  facts.title = document.title;
  return facts;
}
