//! Pictures of a report as SVG: curves, histograms, calibration, bars with intervals.
//! Colours are classes that the page's style sheet gives a meaning to, so that a picture follows
//! light, dark and print. Knows numbers and labels; knows no report.

use std::fmt::Write as _;

use minijinja::HtmlEscape;

use super::measure::{Bin, Histogram};

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 22.0;
const TOP: f64 = 12.0;
/// Height of a line of the legend, which stands above the plot: there it hides no curve.
const LEGEND: f64 = 18.0;
const LEGEND_COLUMNS: usize = 2;
const BOTTOM: f64 = 46.0;
/// Height of one bar with its gap.
const BAR: f64 = 24.0;
/// Where bars begin: their labels are before.
const BARS_LEFT: f64 = 190.0;
/// Longer labels are cut.
const LABEL_CHARS: usize = 26;

/// What a picture is called, for those who see it and for those who hear it.
#[derive(Clone, Copy, Debug)]
pub struct Caption<'a> {
    /// Unique on the page.
    pub id: &'a str,
    pub title: &'a str,
    /// What is to be seen, in words.
    pub description: &'a str,
}

/// One line of a plot.
#[derive(Clone, Debug)]
pub struct Line<'a> {
    pub name: &'a str,
    pub points: Vec<[f64; 2]>,
}

/// A horizontal bar with its interval, all from 0 to 1.
#[derive(Clone, Debug)]
pub struct Bar {
    pub label: String,
    pub value: f64,
    pub interval: Option<[f64; 2]>,
    /// What stands behind it, e.g. `3/120`.
    pub note: String,
    /// The class of its colour: `positive`, `negative` or `s0` to `s3`.
    pub class: &'static str,
}

/// ROC curves up to a false-positive rate of `most`.
pub fn roc(caption: &Caption<'_>, lines: &[Line<'_>], most: f64) -> String {
    let frame = Frame {
        x: Axis::shares("false-positive rate", most),
        y: Axis::shares("true-positive rate", 1.0),
        legend: line_keys(lines.iter().map(|line| line.name)),
    };
    let mut svg = frame.open(caption);
    frame.line(&mut svg, &clipped(&[[0.0, 0.0], [1.0, 1.0]], most), "guide");
    for (index, line) in lines.iter().enumerate() {
        let class = format!("line s{index}");
        frame.line(&mut svg, &clipped(&line.points, most), &class);
    }
    svg + "</svg>"
}

/// Scores by label, with thresholds as upright lines.
pub fn scores(
    caption: &Caption<'_>,
    histogram: &Histogram,
    labels: [&str; 2],
    thresholds: &[(String, f64)],
) -> String {
    let highest = histogram.positives.iter().chain(&histogram.negatives);
    let highest = highest.copied().fold(0.0, f64::max).max(0.01);
    let frame = Frame {
        x: Axis::numbers("gathered logit", histogram.low, histogram.high),
        y: Axis::shares("share of the label's rows", highest * 1.08),
        legend: vec![
            Key {
                name: labels[0],
                class: "positive key".into(),
                is_line: false,
            },
            Key {
                name: labels[1],
                class: "negative key".into(),
                is_line: false,
            },
        ],
    };
    let mut svg = frame.open(caption);
    for (shares, class) in [
        (&histogram.negatives, "negative"),
        (&histogram.positives, "positive"),
    ] {
        let width = (histogram.high - histogram.low) / shares.len().max(1) as f64;
        let mut outline = vec![[histogram.low, 0.0]];
        for (index, share) in shares.iter().enumerate() {
            let from = histogram.low + width * index as f64;
            outline.extend([[from, *share], [from + width, *share]]);
        }
        outline.push([histogram.high, 0.0]);
        frame.line(&mut svg, &outline, &format!("area {class}"));
    }
    let inside = |at: f64| histogram.low <= at && at <= histogram.high;
    for (name, at) in thresholds.iter().filter(|(_, at)| inside(*at)) {
        frame.line(&mut svg, &[[*at, 0.0], [*at, highest * 1.08]], "guide");
        let (x, y) = (frame.x_of(*at) + 4.0, frame.top() + 6.0);
        let _ = write!(
            svg,
            r#"<text class="small" transform="translate({x:.1} {y:.1}) rotate(90)">{}</text>"#,
            HtmlEscape(name)
        );
    }
    svg + "</svg>"
}

/// Told probabilities against what came true; a point is as large as its rows are many.
pub fn calibration(caption: &Caption<'_>, scorers: &[(&str, &[Bin])]) -> String {
    let frame = Frame {
        x: Axis::shares("mean probability told", 1.0),
        y: Axis::shares("share of positives", 1.0),
        legend: line_keys(scorers.iter().map(|(name, _)| *name)),
    };
    let mut svg = frame.open(caption);
    frame.line(&mut svg, &[[0.0, 0.0], [1.0, 1.0]], "guide");
    for (index, (_, bins)) in scorers.iter().enumerate() {
        let points: Vec<[f64; 2]> = bins.iter().map(|b| [b.mean_probability, b.share]).collect();
        frame.line(&mut svg, &points, &format!("line s{index}"));
        let most = bins.iter().map(|bin| bin.rows).max().unwrap_or(1).max(1) as f64;
        for bin in *bins {
            let radius = 2.0 + 4.0 * (bin.rows as f64 / most).sqrt();
            let (x, y) = (frame.x_of(bin.mean_probability), frame.y_of(bin.share));
            let _ = write!(
                svg,
                r#"<circle class="dot s{index}" cx="{x:.1}" cy="{y:.1}" r="{radius:.1}"/>"#
            );
        }
    }
    svg + "</svg>"
}

/// `(layer, value, interval)`
pub type LayerPoint = (f64, f64, Option<[f64; 2]>);

/// A number by layer, with its interval, one line per name.
pub fn layers(
    caption: &Caption<'_>,
    y_name: &'static str,
    lines: &[(&str, Vec<LayerPoint>)],
) -> String {
    let every = || lines.iter().flat_map(|(_, points)| points);
    let last = every().map(|(layer, ..)| *layer).fold(1.0, f64::max);
    let least = every().map(|(_, value, interval)| interval.map_or(*value, |i| i[0]));
    let floor = (least.fold(1.0, f64::min) * 10.0).floor() / 10.0;
    let frame = Frame {
        x: Axis::layers(last),
        y: Axis {
            name: y_name,
            low: floor.min(0.9),
            high: 1.0,
            kind: Ticks::Plain,
        },
        legend: line_keys(lines.iter().map(|(name, _)| *name)),
    };
    let mut svg = frame.open(caption);
    for (index, (_, points)) in lines.iter().enumerate() {
        for (layer, _, interval) in points {
            if let Some([low, high]) = interval {
                let whisker = [[*layer, *low], [*layer, *high]];
                frame.line(&mut svg, &whisker, &format!("whisker s{index}"));
            }
        }
        let values: Vec<[f64; 2]> = points.iter().map(|(l, v, _)| [*l, *v]).collect();
        frame.line(&mut svg, &values, &format!("line s{index}"));
        for [layer, value] in values {
            let (x, y) = (frame.x_of(layer), frame.y_of(value));
            let _ = write!(
                svg,
                r#"<circle class="dot s{index}" cx="{x:.1}" cy="{y:.1}" r="2.5"/>"#
            );
        }
    }
    svg + "</svg>"
}

/// Bars from 0 to 1 with their intervals.
pub fn bars(caption: &Caption<'_>, bars: &[Bar]) -> String {
    let (width, right) = (640.0, 130.0);
    let height = TOP + BAR * bars.len() as f64 + 30.0;
    let x_of = |share: f64| BARS_LEFT + share.clamp(0.0, 1.0) * (width - BARS_LEFT - right);
    let mut svg = opened(caption, width, height);
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let (x, bottom) = (x_of(tick), height - 30.0);
        let _ = write!(
            svg,
            r#"<path class="grid" d="M{x:.1} {TOP}V{bottom:.1}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            height - 12.0,
            share(tick)
        );
    }
    for (index, bar) in bars.iter().enumerate() {
        let top = TOP + BAR * index as f64 + 4.0;
        let middle = top + (BAR - 8.0) / 2.0;
        let end = x_of(bar.value);
        let _ = write!(
            svg,
            concat!(
                r#"<text class="label" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                r#"<rect class="bar {}" x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}"/>"#,
                r#"<text class="label" x="{:.1}" y="{:.1}">{}</text>"#,
            ),
            BARS_LEFT - 8.0,
            middle + 4.0,
            HtmlEscape(&cut(&bar.label)),
            bar.class,
            BARS_LEFT,
            top,
            (end - BARS_LEFT).max(0.0),
            BAR - 8.0,
            width - right + 8.0,
            middle + 4.0,
            HtmlEscape(&bar.note),
        );
        if let Some([low, high]) = bar.interval {
            let (from, to) = (x_of(low), x_of(high));
            let _ = write!(
                svg,
                r#"<path class="whisker" d="M{from:.1} {middle:.1}H{to:.1}"/>"#
            );
        }
    }
    svg + "</svg>"
}

/// A curve up to `x <= most`, with a point on that edge.
fn clipped(points: &[[f64; 2]], most: f64) -> Vec<[f64; 2]> {
    let mut kept: Vec<[f64; 2]> = Vec::new();
    for point in points {
        if point[0] <= most {
            kept.push(*point);
            continue;
        }
        if let Some(before) = kept.last().copied() {
            let part = (most - before[0]) / (point[0] - before[0]);
            kept.push([most, before[1] + part * (point[1] - before[1])]);
        }
        break;
    }
    kept
}

fn cut(label: &str) -> String {
    match label.char_indices().nth(LABEL_CHARS) {
        None => label.to_owned(),
        Some(_) => label.chars().take(LABEL_CHARS - 1).chain(['…']).collect(),
    }
}

fn opened(caption: &Caption<'_>, width: f64, height: f64) -> String {
    let id = HtmlEscape(caption.id);
    format!(
        concat!(
            r#"<svg viewBox="0 0 {width} {height}" role="img" "#,
            r#"aria-labelledby="{id}-title {id}-desc"><title id="{id}-title">{title}</title>"#,
            r#"<desc id="{id}-desc">{desc}</desc>"#,
        ),
        width = width,
        height = height,
        id = id,
        title = HtmlEscape(caption.title),
        desc = HtmlEscape(caption.description),
    )
}

struct Axis {
    name: &'static str,
    low: f64,
    high: f64,
    kind: Ticks,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ticks {
    Percent,
    Plain,
    Whole,
}

impl Axis {
    fn shares(name: &'static str, most: f64) -> Self {
        Self {
            name,
            low: 0.0,
            high: most,
            kind: Ticks::Percent,
        }
    }

    fn numbers(name: &'static str, low: f64, high: f64) -> Self {
        Self {
            name,
            low,
            high,
            kind: Ticks::Plain,
        }
    }

    fn layers(last: f64) -> Self {
        Self {
            name: "layer",
            low: 0.0,
            high: last,
            kind: Ticks::Whole,
        }
    }

    /// Some five round numbers within the axis.
    fn ticks(&self) -> Vec<f64> {
        let span = self.high - self.low;
        let rough = span / 5.0;
        let magnitude = 10f64.powf(rough.log10().floor());
        let round = [1.0, 2.0, 2.5, 5.0, 10.0].map(|factor| factor * magnitude);
        let step = round.into_iter().find(|step| *step >= rough * 0.999);
        let mut step = step.unwrap_or(rough);
        if self.kind == Ticks::Whole {
            step = step.ceil().max(1.0);
        }
        let first = (self.low / step - 1e-9).ceil();
        let count = ((self.high / step + 1e-9).floor() - first).max(0.0) as usize;
        (0..=count).map(|n| (first + n as f64) * step).collect()
    }

    fn told(&self, tick: f64) -> String {
        match self.kind {
            Ticks::Percent => share(tick),
            Ticks::Whole => format!("{tick:.0}"),
            Ticks::Plain => {
                // Without the noise of a sum of tenths, and without a minus before nothing.
                let rounded = (tick * 1e6).round() / 1e6;
                format!("{}", rounded + 0.0)
            }
        }
    }
}

/// `2.5 %` of 0.025.
fn share(share: f64) -> String {
    let percent = (share * 1e4).round() / 1e2;
    format!("{percent} %")
}

/// The axes of a plot, and where values lie between them.
struct Frame<'a> {
    x: Axis,
    y: Axis,
    legend: Vec<Key<'a>>,
}

/// An entry of a legend.
struct Key<'a> {
    name: &'a str,
    class: String,
    is_line: bool,
}

/// The keys of lines `s0`, `s1`, …
fn line_keys<'a>(names: impl Iterator<Item = &'a str>) -> Vec<Key<'a>> {
    let key = |(index, name)| Key {
        name,
        class: format!("line s{index}"),
        is_line: true,
    };
    names.enumerate().map(key).collect()
}

impl Frame<'_> {
    fn top(&self) -> f64 {
        TOP + LEGEND * self.legend.len().div_ceil(LEGEND_COLUMNS) as f64
    }

    fn x_of(&self, value: f64) -> f64 {
        LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (WIDTH - LEFT - RIGHT)
    }

    fn y_of(&self, value: f64) -> f64 {
        let share = (value - self.y.low) / (self.y.high - self.y.low);
        HEIGHT - BOTTOM - share * (HEIGHT - self.top() - BOTTOM)
    }

    fn open(&self, caption: &Caption<'_>) -> String {
        let mut svg = opened(caption, WIDTH, HEIGHT);
        let (top, bottom, right) = (self.top(), HEIGHT - BOTTOM, WIDTH - RIGHT);
        self.draw_legend(&mut svg);
        for tick in self.x.ticks() {
            let x = self.x_of(tick);
            let _ = write!(
                svg,
                r#"<path class="grid" d="M{x:.1} {top}V{bottom}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                bottom + 16.0,
                self.x.told(tick)
            );
        }
        for tick in self.y.ticks() {
            let y = self.y_of(tick);
            let _ = write!(
                svg,
                r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"#,
                LEFT - 6.0,
                y + 4.0,
                self.y.told(tick)
            );
        }
        let _ = write!(
            svg,
            r#"<text class="axis" x="{:.1}" y="{:.1}" text-anchor="middle">{}</text><text class="axis" transform="translate(13 {:.1}) rotate(-90)" text-anchor="middle">{}</text>"#,
            (LEFT + right) / 2.0,
            HEIGHT - 8.0,
            HtmlEscape(self.x.name),
            (top + bottom) / 2.0,
            HtmlEscape(self.y.name),
        );
        svg
    }

    fn line(&self, svg: &mut String, points: &[[f64; 2]], class: &str) {
        if points.is_empty() {
            return;
        }
        let _ = write!(svg, r#"<polyline class="{class}" points=""#);
        for [x, y] in points {
            let _ = write!(svg, "{:.1},{:.1} ", self.x_of(*x), self.y_of(*y));
        }
        svg.push_str("\"/>");
    }

    fn draw_legend(&self, svg: &mut String) {
        let width = (WIDTH - LEFT - RIGHT) / LEGEND_COLUMNS as f64;
        for (index, key) in self.legend.iter().enumerate() {
            let x = LEFT + width * (index % LEGEND_COLUMNS) as f64;
            let y = TOP + LEGEND * (index / LEGEND_COLUMNS) as f64;
            let (class, middle) = (&key.class, y + 3.0);
            let _ = match key.is_line {
                true => write!(svg, r#"<path class="{class}" d="M{x:.1} {middle:.1}h26"/>"#),
                false => write!(
                    svg,
                    r#"<rect class="{class}" x="{:.1}" y="{:.1}" width="12" height="12"/>"#,
                    x + 14.0,
                    middle - 6.0
                ),
            };
            let _ = write!(
                svg,
                r#"<text class="label" x="{:.1}" y="{:.1}">{}</text>"#,
                x + 32.0,
                middle + 4.0,
                HtmlEscape(&cut(key.name))
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAPTION: Caption<'_> = Caption {
        id: "a",
        title: "A <title>",
        description: "What is \"seen\"",
    };

    #[test]
    fn a_picture_says_what_it_is_and_lets_no_markup_through() {
        let line = Line {
            name: "<script>",
            points: vec![[0.0, 0.0], [0.5, 1.0], [1.0, 1.0]],
        };
        let svg = roc(&CAPTION, &[line], 1.0);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"));
        assert!(
            svg.contains("A &lt;title&gt;") && svg.contains("aria-labelledby=\"a-title a-desc\"")
        );
        assert!(!svg.contains("<script>"), "{svg}");
    }

    #[test]
    fn a_curve_ends_at_the_edge_of_the_plot() {
        let kept = clipped(&[[0.0, 0.0], [0.0, 0.5], [0.4, 0.9], [1.0, 1.0]], 0.1);
        assert_eq!(kept.len(), 3);
        assert_eq!(kept[2][0], 0.1);
        assert!((kept[2][1] - 0.6).abs() < 1e-9);
    }

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        let ticks = |low, high| Axis::numbers("x", low, high).ticks();
        assert_eq!(
            ticks(0.0, 1.0),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(Axis::layers(29.0).ticks(), [0.0, 10.0, 20.0]);
        assert_eq!(Axis::numbers("x", 0.0, 1.0).told(0.6000000000000001), "0.6");
        assert_eq!(Axis::shares("x", 0.1).told(0.02), "2 %");
    }

    #[test]
    fn a_long_label_is_cut() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"é".repeat(40)).chars().count(), LABEL_CHARS);
    }

    #[test]
    fn every_picture_can_be_drawn_of_little() {
        let histogram = Histogram {
            low: -0.5,
            high: 0.5,
            positives: vec![0.0],
            negatives: vec![1.0],
        };
        for svg in [
            roc(&CAPTION, &[], 0.1),
            scores(&CAPTION, &histogram, ["p", "n"], &[("t".into(), 0.0)]),
            calibration(&CAPTION, &[("p", &[])]),
            layers(&CAPTION, "AUROC", &[("resid_post", vec![(0.0, 0.5, None)])]),
            bars(&CAPTION, &[]),
        ] {
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    proptest! {
        #[test]
        fn ticks_lie_on_their_axis(low in -1e3f64..1e3, span in 1e-3f64..1e3) {
            let ticks = Axis::numbers("x", low, low + span).ticks();
            prop_assert!((2..=9).contains(&ticks.len()), "{:?}", ticks);
            for tick in ticks {
                prop_assert!(low - 1e-6 * span <= tick && tick <= low + span * (1.0 + 1e-6));
            }
        }
    }
}
