// Read by tex-svg.js when it starts. As SVG, formulas need no fonts beside them.
window.MathJax = {
  tex: {
    inlineMath: [["$", "$"], ["\\(", "\\)"]],
    displayMath: [["$$", "$$"], ["\\[", "\\]"]],
    processEscapes: true,
  },
  options: {
    ignoreHtmlClass: "jp-InputArea-editor|jp-RenderedText", // "$" in code and prints is a dollar
    enableMenu: false, // it would fetch more of MathJax
  },
};
