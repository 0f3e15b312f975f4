// Paper is white: a dark theme would print pale letters.
(() => {
  let onScreen;
  addEventListener("beforeprint", () => {
    onScreen = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
  });
  addEventListener("afterprint", () => {
    document.documentElement.dataset.theme = onScreen;
  });
})();
