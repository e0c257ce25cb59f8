// The page, from the data that it holds.

/** The button is called by what it does. Until it is pressed, the theme is the system's. */
function startTheme(button) {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const say = () => {
    button.textContent = isDark() ? "Use light theme" : "Use dark theme";
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    say();
  });
  prefersDark.addEventListener("change", say);
  say();
}

const SECTIONS = [
  { id: "summary", show: showSummary, needs: "runs" },
  { id: "result", show: showResult, needs: "runs" },
  { id: "curves", show: showCurves, needs: "runs" },
  { id: "training", show: showTraining, needs: "runs" },
  { id: "counts", show: showCounts, needs: "runs" },
  { id: "quality", show: showQuality, needs: "quality" },
  { id: "tokens", show: showTokens, needs: "runs" },
];

/** A page has runs, a critic's quality, or both: sections without data leave it, and so do their links. */
function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const has = { runs: data.runs.length > 0, quality: data.quality !== null };
  startTheme(document.getElementById("theme"));
  for (const { id, show, needs } of SECTIONS) {
    const section = document.getElementById(id);
    if (has[needs]) {
      show(section, data);
    } else {
      section.remove();
      document.querySelector(`nav a[href="#${id}"]`)?.remove();
    }
  }
}

start();
