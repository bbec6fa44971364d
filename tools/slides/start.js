// Typeset, fit, show: the order matters, since only what is complete can be measured.
async function start() {
  await MathJax.startup.promise;
  await document.fonts.ready;
  await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
  fitSlides(document.querySelector(".reveal .slides"));
  document.documentElement.classList.remove("fitting");
  await Reveal.initialize({
    width: 1280,
    height: 720,
    margin: 0,
    center: false,
    hash: true,
    slideNumber: "c/t",
    transition: "none",
    pdfSeparateFragments: false,
    plugins: [RevealNotes],
  });
}

window.addEventListener("DOMContentLoaded", start);
