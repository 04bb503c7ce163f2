//! Rankings as a picture: an SVG with AUROC by site, or by the number of rows, one line per set of
//! rows, with intervals.
//! Knows rankings; knows no files.

use inwit_probes::DataRecord;
use plotters::prelude::*;

use super::curve::Curve;
use super::sweep::{Rankings, Sweep, ends};
use crate::error::{Error, Result};

/// A line: its name, and by place on the axis the lower end, the value and the upper end.
type Line = (String, Vec<(f64, [f64; 3])>);

/// What lies along the bottom.
struct Axis<'a> {
    title: &'a str,
    ends: [f64; 2],
    labels: usize,
    label: &'a dyn Fn(&f64) -> String,
    /// How far the lines stand beside each other.
    shift: f64,
}

/// AUROC by site in the order of the sweep.
pub fn by_site(title: &str, sweep: &Sweep) -> Result<String> {
    let places = sweep.sites.iter().enumerate();
    let rows: Vec<_> = places.map(|(at, row)| (at as f64, &row.rankings)).collect();
    let last = sweep.sites.len().saturating_sub(1).max(1) as f64;
    let axis = Axis {
        title: "site (the number is the block's)",
        ends: [-0.5, last + 0.5],
        labels: sweep.sites.len().min(16),
        label: &|at| label(sweep, *at),
        shift: 0.08,
    };
    drawn(title, &axis, &lines(&rows, &sweep.dev))
}

/// AUROC by the number of rows that were learnt from, each doubling as wide as the next.
pub fn by_rows(title: &str, curve: &Curve) -> Result<String> {
    let points = curve.points.iter();
    let place = |rows: usize| (rows.max(1) as f64).log2();
    let rows: Vec<_> = points.map(|p| (place(p.rows), &p.rankings)).collect();
    let of = |pick: fn(f64, f64) -> f64, start| rows.iter().map(|(at, _)| *at).fold(start, pick);
    let axis = Axis {
        title: "rows learnt from",
        ends: [of(f64::min, f64::MAX) - 0.3, of(f64::max, 0.0) + 0.3],
        labels: 8,
        label: &|at| format!("{:.0}", at.exp2()),
        shift: 0.02,
    };
    drawn(title, &axis, &lines(&rows, &curve.dev))
}

fn lines(rows: &[(f64, &Rankings)], dev: &[DataRecord]) -> Vec<Line> {
    let held_out = rows
        .iter()
        .map(|(at, row)| (*at, ends(&row.held_out.auroc)));
    let mut lines = vec![("held out".to_owned(), held_out.collect())];
    for (file, data) in dev.iter().enumerate() {
        let of_file = rows.iter().filter_map(|(at, row)| {
            let ranking = row.dev[file].as_ref()?;
            Some((*at, ends(&ranking.auroc)))
        });
        lines.push((data.name.clone(), of_file.collect()));
    }
    if dev.len() > 1 {
        let together = rows.iter().filter_map(|(at, row)| {
            let ranking = row.dev_together.as_ref()?;
            Some((*at, ends(&ranking.auroc)))
        });
        lines.push(("development files together".to_owned(), together.collect()));
    }
    lines.retain(|(_, points): &Line| !points.is_empty());
    lines
}

fn drawn(title: &str, axis: &Axis<'_>, lines: &[Line]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, title, axis, lines)
        .map_err(|error| Error::internal(format!("the plot could not be drawn: {error}")))?;
    Ok(svg)
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(svg: &mut String, title: &str, axis: &Axis<'_>, lines: &[Line]) -> Drawn {
    let values = lines.iter().flat_map(|(_, points)| points);
    let lowest = values.map(|(_, [low, ..])| *low).fold(0.5, f64::min);
    let [first, last] = axis.ends;
    let root = SVGBackend::with_string(svg, (960, 540)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(first..last, (lowest - 0.02).max(0.0)..1.0)?;
    chart
        .configure_mesh()
        .x_labels(axis.labels)
        .x_label_formatter(&|at| (axis.label)(at))
        .x_desc(axis.title)
        .y_desc("AUROC, 95 % interval")
        .draw()?;
    for (index, (name, points)) in lines.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        // Side by side, so that one interval does not hide another.
        let shift = (index as f64 - (lines.len() - 1) as f64 / 2.0) * axis.shift;
        let line = points
            .iter()
            .map(|(at, [_, value, _])| (*at + shift, *value));
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        chart.draw_series(points.iter().map(|(at, [low, _, high])| {
            let x = *at + shift;
            PathElement::new([(x, *low), (x, *high)], colour.mix(0.5))
        }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}

/// The block's number where one site stands for its block, else the whole name.
fn label(sweep: &Sweep, at: f64) -> String {
    let whole = (at - at.round()).abs() < 1e-6 && at >= 0.0;
    let site = sweep.sites.get(at.round() as usize).filter(|_| whole);
    site.map_or_else(String::new, |row| match row.site.layer() {
        Some(layer) => layer.to_string(),
        None => row.site.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use inwit_probes::manifest::{DataRecord, ModelIdentity};
    use inwit_probes::{Gather, Metric, Positions, Site};

    use super::*;
    use crate::lab::curve::Point;
    use crate::lab::scored::Ranking;
    use crate::lab::sweep::SiteRow;

    fn ranking(value: f64) -> Ranking {
        Ranking {
            auroc: Metric {
                value,
                interval: Some([value - 0.05, value + 0.02]),
            },
            tpr_at_one_percent: None,
        }
    }

    fn rankings(held_out: f64, dev: usize) -> Rankings {
        Rankings {
            held_out: ranking(held_out),
            dev: vec![Some(ranking(0.6)); dev],
            dev_together: (dev > 0).then(|| ranking(0.65)),
            remarks: Vec::new(),
        }
    }

    fn data(name: &str) -> DataRecord {
        DataRecord {
            name: name.into(),
            sha256: "0".into(),
            rows: 9,
        }
    }

    fn model() -> ModelIdentity {
        ModelIdentity {
            name: "m".into(),
            architecture_id: "a".into(),
            weights_id: "w".into(),
            weight_format: "f32".into(),
        }
    }

    fn sweep(dev: &[&str]) -> Sweep {
        let row = |layer: u16| SiteRow {
            site: Site::ResidPost(layer),
            rankings: rankings(0.7 + f64::from(layer) / 20.0, dev.len()),
        };
        Sweep {
            model: model(),
            kind: "lda",
            positions: Positions::LastPromptToken,
            gather: Gather::Last,
            settings: String::new(),
            seed: 0,
            data: data("train.jsonl"),
            rows_fitted: 8,
            rows_held_out: 2,
            dev: dev.iter().map(|name| data(name)).collect(),
            passes: 1,
            command: String::new(),
            sites: (0..4).map(row).collect(),
        }
    }

    #[test]
    fn a_plot_has_a_line_for_each_set_of_rows() {
        let svg = by_site("sweep", &sweep(&["dev_a.jsonl", "dev_b.jsonl"])).expect("draws");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for name in ["held out", "dev_a.jsonl", "dev_b.jsonl", "together"] {
            assert!(svg.contains(name), "{name}");
        }
        let alone = by_site("sweep", &sweep(&[])).expect("draws");
        assert!(!alone.contains("together"));
    }

    #[test]
    fn a_curve_is_drawn_by_its_rows() {
        let point = |rows: usize| Point {
            share: rows as f64 / 800.0,
            rows,
            groups: rows,
            rankings: rankings(0.8, 2),
        };
        let curve = Curve {
            model: model(),
            kind: "attention",
            sites: vec![Site::ResidPost(1)],
            positions: Positions::PromptContent,
            gather: Gather::Attention,
            settings: String::new(),
            seed: 0,
            data: data("train.jsonl"),
            rows_held_out: 2,
            dev: vec![data("dev_a.jsonl"), data("dev_b.jsonl")],
            command: String::new(),
            points: [100, 200, 400, 800].map(point).to_vec(),
        };
        let svg = by_rows("curve", &curve).expect("draws");
        for name in ["rows learnt from", "held out", "dev_b.jsonl", "together"] {
            assert!(svg.contains(name), "{name}");
        }
        let one = Curve {
            points: vec![point(100)],
            ..curve
        };
        by_rows("one point", &one).expect("draws");
    }

    #[test]
    fn sites_are_labelled_by_their_block() {
        let sweep = sweep(&[]);
        assert_eq!(label(&sweep, 3.0), "3");
        assert_eq!(label(&sweep, 2.5), "");
        assert_eq!(label(&sweep, 9.0), "");
    }
}
