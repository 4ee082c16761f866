// Curves over the steps, a chart for each, with a line for each run. The same on a live page and in a report.
"use strict";

const Charts = (() => {
  const HEIGHT = 150;
  const LINES = ["--line-0", "--line-1", "--line-2", "--line-3", "--line-4", "--line-5"];
  const together = uPlot.sync("steps");

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function shown(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : value.toFixed(size < 10 ? 3 : 1);
    return text.replace("-", "\u2212");
  }

  const tables = (chart, runs) => uPlot.join(runs.map((run) => run.curves[chart.field] || [[], []]));

  // The newest step at which this run has a value.
  function newest(chart, run) {
    const [steps, values] = run.curves[chart.field] || [[], []];
    for (let place = steps.length - 1; place >= 0; place--) {
      if (values[place] !== null) return [steps[place], values[place]];
    }
    return [null, null];
  }

  // A flat curve lies in the middle.
  function range(plot, low, high) {
    if (low === null) return [0, 1];
    const margin = high > low ? 0.08 * (high - low) : Math.max(0.5, 0.1 * Math.abs(high));
    return [low - margin, high + margin];
  }

  function options(chart, runs, width, point) {
    const axis = {
      stroke: color("--muted"),
      grid: { stroke: color("--line"), width: 1 },
      ticks: { stroke: color("--line"), width: 1 },
      font: "11px system-ui, sans-serif",
    };
    return {
      width,
      height: HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: together.key }, y: false, drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range } },
      axes: [{ ...axis, size: 28 }, { ...axis, size: 52 }],
      series: [
        {},
        ...runs.map((run, number) => ({
          label: run.name,
          stroke: color(LINES[number]),
          width: number === 0 ? 1.75 : 1.25,
          dash: number === 0 ? undefined : [5, 3],
          spanGaps: false,
          points: { show: (plot, series, first, last) => last - first < 40, size: 4 },
        })),
      ],
      hooks: { setCursor: [(plot) => point(plot.cursor.idx)] },
    };
  }

  function make(parent, chart, runs) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const [title, unit, value] = ["b", "span", "span"].map((tag) => caption.appendChild(document.createElement(tag)));
    title.textContent = chart.title;
    unit.textContent = chart.unit;
    unit.className = "hint";
    value.className = "value";
    const box = document.createElement("div");
    box.className = "plot";
    box.setAttribute("role", "img");
    figure.append(caption, box);
    figure.dataset.field = chart.field;
    parent.append(figure);

    let plot;
    let data = tables(chart, runs);
    function say(place) {
      const [step, last] = newest(chart, runs[0]);
      const there = place !== null && place !== undefined && data[0].length > place;
      value.textContent = there ? `${shown(data[1][place])} at step ${data[0][place]}` : shown(last);
      box.setAttribute("aria-label", step === null ? `${chart.title}: no value` : `${chart.title}: ${shown(last)} at step ${step}`);
    }
    function draw() {
      if (plot) plot.destroy();
      plot = new uPlot(options(chart, runs, box.clientWidth || 300, say), data, box);
      say(null);
    }
    draw();
    const watch = new ResizeObserver(() => {
      if (box.clientWidth && plot.width !== box.clientWidth) plot.setSize({ width: box.clientWidth, height: HEIGHT });
    });
    watch.observe(box);
    return {
      draw,
      refresh() {
        data = tables(chart, runs);
        plot.setData(data);
        say(null);
      },
      remove() {
        watch.disconnect();
        plot.destroy();
        figure.remove();
      },
    };
  }

  function list(legend, runs) {
    legend.hidden = runs.length < 2;
    legend.replaceChildren(
      ...runs.map((run, number) => {
        const item = document.createElement("li");
        const mark = item.appendChild(document.createElement("i"));
        mark.className = `mark-${number}`;
        item.append(run.name);
        return item;
      }),
    );
  }

  // Draws `found` ({charts, runs}) into `parent`; returns what redraws it.
  function show(parent, legend, found) {
    parent.replaceChildren();
    list(legend, found.runs);
    const made = found.charts.map((chart) => make(parent, chart, found.runs));
    if (!made.length) {
      const note = document.createElement("p");
      note.className = "note";
      note.textContent = "No step yet.";
      parent.append(note);
    }
    const again = () => made.forEach((chart) => chart.draw());
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", again);
    return {
      refresh: () => made.forEach((chart) => chart.refresh()),
      remove() {
        scheme.removeEventListener("change", again);
        made.forEach((chart) => chart.remove());
      },
    };
  }

  return { show };
})();
