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

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const section = (id) => document.getElementById(id);
  startTheme(section("theme"));
  showSummary(section("summary"), data);
  showResult(section("result"), data);
  showCurves(section("curves"), data);
  showTraining(section("training"), data);
  showCounts(section("counts"), data);
  showTokens(section("tokens"), data);
}

start();
