//! Latencies as a picture: an SVG with one line per latency, by percentile.
//! Knows histograms; knows no files.

use hdrhistogram::Histogram;
use plotters::prelude::*;

use super::load::at;
use crate::error::{Error, Result};

/// Points per line.
const POINTS: usize = 200;

/// Latency in milliseconds by percentile; the percentiles are spread so that each further nine
/// (90 %, 99 %, 99.9 %) takes the same width. Histograms without a value are left out.
pub fn percentiles(title: &str, latencies: &[(&'static str, &Histogram<u64>)]) -> Result<String> {
    let latencies: Vec<_> = latencies
        .iter()
        .filter(|(_, times)| !times.is_empty())
        .collect();
    let most = latencies
        .iter()
        .map(|(_, times)| times.len())
        .max()
        .unwrap_or(1);
    // A percentile finer than the values are many says nothing.
    let nines = (most as f64).log10().clamp(1.0, 5.0);
    let highest = latencies.iter().map(|(_, times)| times.max()).max();
    let highest = (highest.unwrap_or(1) as f64 / 1e3).max(1e-3);
    let mut svg = String::new();
    draw(&mut svg, title, &latencies, nines, highest)
        .map_err(|error| Error::internal(format!("the plot could not be drawn: {error}")))?;
    Ok(svg)
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(
    svg: &mut String,
    title: &str,
    latencies: &[&(&'static str, &Histogram<u64>)],
    nines: f64,
    highest: f64,
) -> Drawn {
    let root = SVGBackend::with_string(svg, (900, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..nines, 0.0..highest * 1.05)?;
    chart
        .configure_mesh()
        .x_labels(nines.ceil() as usize + 1)
        .x_label_formatter(&|nines| percent(*nines))
        .x_desc("percentile")
        .y_desc("milliseconds")
        .draw()?;
    for (index, (name, times)) in latencies.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let point = |step: usize| {
            let x = nines * step as f64 / POINTS as f64;
            (x, at(times, 1.0 - 10f64.powf(-x)))
        };
        chart
            .draw_series(LineSeries::new(
                (0..=POINTS).map(point),
                colour.stroke_width(2),
            ))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}

/// 0 is 0 %, 1 is 90 %, 2 is 99 %.
fn percent(nines: f64) -> String {
    let percent = 100.0 * (1.0 - 10f64.powf(-nines));
    let digits = (nines - 2.0).max(0.0).ceil() as usize;
    format!("{percent:.digits$} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_further_nine_has_its_name() {
        let names = [0.0, 1.0, 2.0, 3.0].map(percent);
        assert_eq!(names, ["0 %", "90 %", "99 %", "99.9 %"]);
    }

    #[test]
    fn a_plot_has_a_line_for_each_latency_that_was_measured() {
        let mut some = Histogram::<u64>::new(3).expect("a histogram");
        (1..2000).for_each(|us| some.saturating_record(us));
        let none = Histogram::<u64>::new(3).expect("a histogram");
        let svg = percentiles("load", &[("answer", &some), ("score", &none)]).expect("draws");
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(svg.contains("answer") && !svg.contains("score"));
        percentiles("nothing", &[("score", &none)]).expect("draws nothing");
    }
}
