//! A probe's report as a page: tables of what was measured, claims where there may be any, and
//! pictures.

use inwit_probes::DataRecord;

use super::layers::{Ranked, Sweep};
use super::measure::{Measured, Rate};
use super::page::{Figure, Page, Section, Table, fact};
use super::picture::{self, Bar, Caption, LayerPoint, Line};
use super::report::{
    BaselineFacts, CategoryRow, Configuration, ProbeReport, ScorerReport, SetReport, percent,
};

/// More bars than this nobody reads; the JSON file has all.
const MOST_BARS: usize = 48;
/// A curve that ends at one false positive in ten shows where probes are used.
const LOW_FPR: f64 = 0.1;

/// The page of a report.
pub fn page(report: &ProbeReport) -> Page {
    let probe = &report.probe;
    let mut sections = vec![overview(report)];
    for (index, set) in report.sets.iter().enumerate() {
        sections.push(set_section(set, index));
    }
    sections.extend(report.sweep.as_ref().map(layer_section));
    sections.push(configuration_section(report));
    Page {
        title: format!("Probe {}", probe.name),
        lead: format!(
            "A probe ({}) of {} at {}, gathered by {}, on {}, model {}.",
            probe.kind,
            probe.positions,
            probe.sites.join(", "),
            probe.gather,
            sets_in_words(report.sets.len()),
            report.configuration.model,
        ),
        sections,
    }
}

fn sets_in_words(count: usize) -> String {
    match count {
        1 => "one set".into(),
        count => format!("{count} sets"),
    }
}

fn overview(report: &ProbeReport) -> Section {
    let mut table = Table::new(
        "The probe on each set. Brackets hold 95 % intervals: bootstrap over groups, and \
         Clopper-Pearson for rates at a stored threshold.",
        &[
            "set",
            "rows",
            "AUROC",
            "TPR at 1 % FPR",
            "recall at the 1 % threshold",
            "FPR at the 1 % threshold",
            "ECE",
        ],
    );
    for set in &report.sets {
        let probe = &set.scorers[0];
        let point = probe.one_percent();
        table.rows.push(vec![
            set.data.name.clone(),
            format!("{} / {}", set.positives, set.negatives),
            number(&probe.auroc),
            detection(probe, 1, set),
            rate(point.and_then(|point| point.recall)),
            rate(point.and_then(|point| point.fpr)),
            number(&probe.ece),
        ]);
    }
    let mut remarks = Vec::new();
    if report.probe.prior.is_none() {
        remarks.push(format!(
            "The probe is not calibrated for {}: it has neither thresholds nor probabilities.",
            report.probe.gather
        ));
    }
    if report.probe.standing != "native" {
        remarks.push(format!(
            "The probe stands to these weights: {}.",
            report.probe.standing
        ));
    }
    if report.baselines.is_none() {
        remarks.push("No training set was given, so no baseline stands beside the probe.".into());
    }
    Section {
        title: "Overview".into(),
        tables: vec![table],
        remarks,
        ..Section::default()
    }
}

fn set_section(set: &SetReport, index: usize) -> Section {
    let mut facts = vec![
        fact(
            "rows",
            format!(
                "{} {} and {} {} in {} groups (prevalence {})",
                set.positives,
                set.positive,
                set.negatives,
                set.negative,
                set.groups,
                percent((set.prevalence * 1000.0).round() / 1000.0)
            ),
        ),
        fact("SHA-256", set.data.sha256.clone()),
    ];
    if set.out_of_domain > 0 {
        facts.push(fact(
            "out of domain",
            format!(
                "{} rows of a form the probe was not trained on",
                set.out_of_domain
            ),
        ));
    }
    if let Some(runs) = set.runs_logged {
        facts.push(fact(
            "runs on this set",
            format!("{runs} in the log, this one included"),
        ));
    }
    let both = set.positives > 0 && set.negatives > 0;
    let mut tables = Vec::new();
    if both {
        tables.push(ranking_table(set));
    }
    tables.push(point_table(set));
    let mut claims: Vec<String> = Vec::new();
    claims.extend(set.claims.iter().map(super::claim::ClaimRow::sentence));
    Section {
        title: set.data.name.clone(),
        facts,
        remarks: set.remarks.clone(),
        tables,
        claims,
        figures: figures(set, index, both),
    }
}

fn ranking_table(set: &SetReport) -> Table {
    let mut table = Table::new(
        "Ranking and calibration, 95 % bootstrap intervals over groups. TPR is at the threshold \
         that this set's own negatives give. Of what is fitted with several seeds: the mean, its \
         interval, and the range over the seeds. Drawing rows anew widens every bin's gap, so the \
         interval of ECE leans upward.",
        &[
            "scorer",
            "AUROC",
            "TPR at 0.1 % FPR",
            "TPR at 1 % FPR",
            "TPR at 5 % FPR",
            "ECE, 15 bins",
        ],
    );
    for scorer in set.scorers.iter().chain(&set.refits) {
        let mut row = vec![scorer.name.clone(), number(&scorer.auroc)];
        row.extend((0..scorer.detection.len()).map(|index| detection(scorer, index, set)));
        row.push(number(&scorer.ece));
        table.rows.push(row);
    }
    table
}

fn point_table(set: &SetReport) -> Table {
    let mut table = Table::new(
        "At thresholds that were fixed beforehand, 95 % Clopper-Pearson intervals.",
        &[
            "scorer",
            "threshold",
            "at logit",
            "recall",
            "false-positive rate",
        ],
    );
    for scorer in &set.scorers {
        for point in &scorer.points {
            table.rows.push(vec![
                scorer.name.clone(),
                point.name.clone(),
                format!("{:.3}", point.threshold_logit),
                rate(point.recall),
                rate(point.fpr),
            ]);
        }
    }
    table
}

fn figures(set: &SetReport, index: usize, both: bool) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut add = |kind: &str,
                   title: &str,
                   description: String,
                   wide,
                   draw: &dyn Fn(&Caption<'_>) -> String| {
        let id = format!("set-{index}-{kind}");
        let caption = Caption {
            id: &id,
            title,
            description: &description,
        };
        figures.push(Figure {
            caption: title.to_owned(),
            svg: draw(&caption),
            wide,
        });
    };
    let name = &set.data.name;
    if both {
        let lines: Vec<Line<'_>> = set.scorers.iter().map(line).collect();
        let areas: Vec<String> = set
            .scorers
            .iter()
            .map(|scorer| format!("{} has AUROC {}", scorer.name, number(&scorer.auroc)))
            .collect();
        let seen = format!("ROC curves on {name}: {}.", areas.join("; "));
        add("roc", "ROC curves", seen.clone(), false, &|caption| {
            picture::roc(caption, &lines, 1.0)
        });
        add(
            "roc-low",
            "ROC curves, up to 10 % false positives",
            seen,
            false,
            &|caption| picture::roc(caption, &lines, LOW_FPR),
        );
    }
    let probe = &set.scorers[0];
    let thresholds: Vec<(String, f64)> = probe
        .one_percent()
        .map(|point| ("1 % threshold".to_owned(), f64::from(point.threshold_logit)))
        .into_iter()
        .collect();
    let seen = format!(
        "How the probe's gathered logits on {name} are spread, from {:.2} to {:.2}, by label.",
        probe.histogram.low, probe.histogram.high
    );
    add(
        "scores",
        "The probe's scores by label",
        seen,
        false,
        &|caption| {
            let labels = [set.positive, set.negative];
            picture::scores(caption, &probe.histogram, labels, &thresholds)
        },
    );
    if !probe.reliability.is_empty() {
        let seen = format!(
            "Share of positives against the mean probability told, in {} bins; ECE {}.",
            probe.reliability.len(),
            number(&probe.ece)
        );
        add(
            "calibration",
            "Calibration of the probe",
            seen,
            false,
            &|caption| picture::calibration(caption, &[(&probe.name, &probe.reliability)]),
        );
    }
    if !set.categories.is_empty() {
        let bars: Vec<Bar> = set.categories.iter().take(MOST_BARS).map(bar).collect();
        let seen = format!(
            "Share of rows above the 1 % threshold on {name} for each of {} labels and categories.",
            bars.len()
        );
        let title = match set.categories.len() > bars.len() {
            true => format!(
                "Rows above the 1 % threshold by category (the first {MOST_BARS} of {})",
                set.categories.len()
            ),
            false => "Rows above the 1 % threshold by category".to_owned(),
        };
        add("categories", &title, seen, true, &|caption| {
            picture::bars(caption, &bars)
        });
    }
    figures
}

fn line(scorer: &ScorerReport) -> Line<'_> {
    Line {
        name: &scorer.name,
        points: scorer.roc.clone(),
    }
}

fn bar(row: &CategoryRow) -> Bar {
    Bar {
        label: format!("{} ({})", row.category, row.label),
        value: row.flagged.rate,
        interval: Some(row.flagged.interval),
        note: format!("{}/{}", row.flagged.count, row.flagged.of),
        class: match row.label {
            "harmful" | "complied" => "positive",
            _ => "negative",
        },
    }
}

fn layer_section(sweep: &Sweep) -> Section {
    // A line for each kind of site and each set of rows.
    let mut lines: Vec<(String, Vec<LayerPoint>)> = Vec::new();
    for swept in &sweep.sites {
        let Some(layer) = swept.site.layer() else {
            continue;
        };
        let kind = swept.site.to_string();
        let kind = kind.rsplit_once(".hook_").map_or("", |(_, kind)| kind);
        let rankings = [
            ("held out", Some(swept.held_out)),
            ("development", swept.dev_together),
        ];
        for (rows, ranked) in rankings {
            let Some(Ranked { auroc }) = ranked else {
                continue;
            };
            let name = format!("{kind}, {rows}");
            let point = (layer as f64, auroc.value, auroc.interval);
            match lines.iter_mut().find(|(known, _)| *known == name) {
                Some((_, points)) => points.push(point),
                None => lines.push((name, vec![point])),
            }
        }
    }
    for (_, points) in &mut lines {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    let named: Vec<(&str, Vec<LayerPoint>)> = lines
        .iter()
        .map(|(name, points)| (name.as_str(), points.clone()))
        .collect();
    let highest = sweep
        .sites
        .iter()
        .max_by(|a, b| a.held_out.auroc.value.total_cmp(&b.held_out.auroc.value));
    let description = highest.map_or(String::new(), |highest| {
        format!(
            "AUROC of a {} probe at each layer; on held-out rows the highest is {:.3} at {}.",
            sweep.kind, highest.held_out.auroc.value, highest.site
        )
    });
    let caption = Caption {
        id: "layers",
        title: "AUROC by layer",
        description: &description,
    };
    let mut table = Table::new(
        "A probe at each site of a sweep, 95 % bootstrap intervals over groups.",
        &["site", "AUROC, held out", "AUROC, development sets"],
    );
    for swept in &sweep.sites {
        let told = |ranked: Option<Ranked>| {
            number(&ranked.map(|ranked| Measured {
                value: ranked.auroc.value,
                interval: ranked.auroc.interval,
                seeds: None,
            }))
        };
        table.rows.push(vec![
            swept.site.to_string(),
            told(Some(swept.held_out)),
            told(swept.dev_together),
        ]);
    }
    Section {
        title: "Layers".into(),
        facts: vec![fact("fitted on", told(&sweep.data))],
        figures: vec![Figure {
            caption: caption.title.into(),
            svg: picture::layers(&caption, "AUROC", &named),
            wide: true,
        }],
        tables: vec![table],
        ..Section::default()
    }
}

fn configuration_section(report: &ProbeReport) -> Section {
    let probe = &report.probe;
    let mut facts = vec![
        fact("probe", format!("{} ({})", probe.name, probe.kind)),
        fact("probe's hash", probe.content_hash.clone()),
        fact("stands to the weights", probe.standing.clone()),
    ];
    if let Some(prior) = probe.prior {
        let stated = percent((prior * 1000.0).round() / 1000.0);
        facts.push(fact(
            "its probabilities assume",
            format!("{stated} positives"),
        ));
    }
    facts.extend(
        probe
            .fitted_on
            .iter()
            .map(|data| fact("fitted on", told(data))),
    );
    if let Some(baselines) = &report.baselines {
        facts.extend(baseline_facts(baselines));
    }
    facts.extend(configuration(&report.configuration));
    Section {
        title: "Configuration".into(),
        facts,
        ..Section::default()
    }
}

fn baseline_facts(baselines: &BaselineFacts) -> Vec<[String; 2]> {
    let seeds: Vec<String> = baselines.recipe_seeds.iter().map(u64::to_string).collect();
    vec![
        fact("baselines fitted on", told(&baselines.trained_on)),
        fact(
            "length only",
            "logistic regression on the logarithms of words and characters",
        ),
        fact(
            "bag of words",
            format!(
                "logistic regression on tf-idf of {} {}; these and the L2 penalty {:e} by \
                 cross-validation over groups",
                baselines.terms,
                if baselines.pairs {
                    "words and pairs"
                } else {
                    "words"
                },
                baselines.penalty
            ),
        ),
        fact(
            "SafeSwitch's recipe",
            format!(
                "prober d -> 64 -> ReLU -> 2 at {}, {}, threshold 0.5; seeds {}",
                baselines.recipe_site,
                baselines.recipe_positions,
                seeds.join(", ")
            ),
        ),
    ]
}

/// The facts of any report's configuration.
pub fn configuration(configuration: &Configuration) -> Vec<[String; 2]> {
    let c = configuration;
    let seeds: Vec<String> = c.seeds.iter().map(u64::to_string).collect();
    vec![
        fact("model", c.model.clone()),
        fact("architecture id", c.architecture_id.clone()),
        fact("weights id", c.weights_id.clone()),
        fact(
            "weights, keys and values",
            format!("{}, {}", c.weight_format, c.kv_type),
        ),
        fact("seeds", seeds.join(", ")),
        fact(
            "bootstrap",
            format!("{} draws of groups, seed {}", c.resamples, c.seed),
        ),
        fact("configuration hash", c.configuration_hash.clone()),
        fact("build", format!("inwit {}, commit {}", c.version, c.commit)),
        fact("machine", c.machine.clone()),
        fact("command", c.command.clone()),
    ]
}

fn told(data: &DataRecord) -> String {
    format!("{}, {} rows, SHA-256 {}", data.name, data.rows, data.sha256)
}

fn number(measured: &Option<Measured>) -> String {
    let Some(measured) = measured else {
        return "–".into();
    };
    match measured.seeds {
        Some([least, most]) => format!("{}, seeds {least:.3} to {most:.3}", measured.short()),
        None => measured.short(),
    }
}

fn detection(scorer: &ScorerReport, index: usize, set: &SetReport) -> String {
    let detection = &scorer.detection[index];
    match detection.tpr {
        None if set.positives > 0 && set.negatives > 0 => {
            format!("needs {:.0} {} rows", 1.0 / detection.fpr, set.negative)
        }
        tpr => number(&tpr),
    }
}

fn rate(rate: Option<Rate>) -> String {
    let Some(rate) = rate else {
        return "–".into();
    };
    match rate.seeds {
        Some([least, most]) => format!(
            "{}, seeds {:.1} to {:.1} %",
            rate.short(),
            least * 100.0,
            most * 100.0
        ),
        None => rate.short(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_a_dash() {
        assert_eq!((number(&None), rate(None)), ("–".into(), "–".into()));
    }

    #[test]
    fn a_number_of_several_seeds_tells_their_range() {
        let measured = Measured {
            value: 0.7,
            interval: Some([0.6, 0.8]),
            seeds: Some([0.65, 0.75]),
        };
        assert_eq!(
            number(&Some(measured)),
            "0.700 (0.600 to 0.800), seeds 0.650 to 0.750"
        );
    }
}
