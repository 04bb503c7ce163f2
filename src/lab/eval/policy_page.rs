//! A policy's report as a page: what it changes for each label and setting, by category, and
//! whether it left alone what it did not flag.

use super::effect::{Effect, Outcome};
use super::measure::Measured;
use super::page::{Figure, Page, Section, Table, fact};
use super::picture::{self, Bar, Caption};
use super::policy::{CategoryEffect, LabelReport, PolicyReport, PolicySet, SettingReport};
use super::probe_page::configuration;

/// More categories than this nobody reads; the JSON file has all.
const MOST_CATEGORIES: usize = 24;

/// The page of a report.
pub fn page(report: &PolicyReport) -> Page {
    let mut sections = Vec::new();
    for (index, set) in report.sets.iter().enumerate() {
        sections.push(set_section(set, index));
    }
    sections.push(configuration_section(report));
    Page {
        title: format!("Policy {}", report.policy),
        lead: format!(
            "Answers of {} with the policy enforced against answers with it off, the same seeds, \
             judged by {}.",
            report.configuration.model,
            report.judges.join(" and ")
        ),
        sections,
    }
}

fn set_section(set: &PolicySet, index: usize) -> Section {
    let mut facts = vec![
        fact(
            "rows",
            format!(
                "{} harmful and {} benign in {} groups",
                set.harmful, set.benign, set.groups
            ),
        ),
        fact("SHA-256", set.data.sha256.clone()),
    ];
    if let Some(runs) = set.runs_logged {
        facts.push(fact(
            "runs on this set",
            format!("{runs} in the log, this one included"),
        ));
    }
    let mut remarks = Vec::new();
    let mut claims = Vec::new();
    for setting in &set.settings {
        for label in &setting.labels {
            claims.extend(
                label
                    .effects
                    .iter()
                    .map(|effect| format!("{}: {}", setting.name, effect.sentence(label.label))),
            );
            if label.unflagged != label.unflagged_same {
                remarks.push(format!(
                    "{} of {} answers to {} prompts that were not flagged differ from those with \
                     the policy off ({}): monitoring must change nothing.",
                    label.unflagged - label.unflagged_same,
                    label.unflagged,
                    label.label,
                    setting.name
                ));
            }
        }
    }
    Section {
        title: set.data.name.clone(),
        facts,
        remarks,
        tables: vec![effect_table(set), action_table(set)],
        claims,
        figures: figures(set, index),
    }
}

fn effect_table(set: &PolicySet) -> Table {
    let mut table = Table::new(
        "Outcomes with the policy off and enforced: means over the seeds, of all rows of the \
         label. An outcome counts where every judge agrees, or where the policy refused. The \
         difference is paired by row and seed, with its 95 % bootstrap interval over groups.",
        &[
            "sampling",
            "label",
            "outcome",
            "off",
            "enforced",
            "difference in points",
            "fewer",
        ],
    );
    for setting in &set.settings {
        for label in &setting.labels {
            for effect in &label.effects {
                table.rows.push(vec![
                    told(setting),
                    label.label.into(),
                    effect.outcome.name().into(),
                    count(effect.off, effect.of),
                    count(effect.enforced, effect.of),
                    points(&effect.difference),
                    fewer(effect),
                ]);
            }
        }
    }
    table
}

fn action_table(set: &PolicySet) -> Table {
    let mut table = Table::new(
        "What the policy did: rows on which it did anything (first seed, 95 % Clopper-Pearson), \
         actions over all seeds, and whether answers that it did not flag are token for token \
         those with the policy off.",
        &[
            "sampling",
            "label",
            "flagged",
            "actions",
            "unflagged and the same",
        ],
    );
    for setting in &set.settings {
        for label in &setting.labels {
            table.rows.push(vec![
                told(setting),
                label.label.into(),
                label.flagged.short(),
                actions(label),
                format!("{} of {}", label.unflagged_same, label.unflagged),
            ]);
        }
    }
    table
}

fn told(setting: &SettingReport) -> String {
    match setting.seeds.len() {
        1 => setting.name.clone(),
        seeds => format!("{}, {seeds} seeds", setting.name),
    }
}

/// Whole where it is, since one seed gives whole answers.
fn count(mean: f64, of: u64) -> String {
    match mean.fract() == 0.0 {
        true => format!("{mean:.0} of {of}"),
        false => format!("{mean:.1} of {of}"),
    }
}

fn points(difference: &Measured) -> String {
    let mut text = format!("{:+.1}", difference.value * 100.0);
    if let Some([low, high]) = difference.interval {
        text += &format!(" ({:+.1} to {:+.1})", low * 100.0, high * 100.0);
    }
    if let Some([least, most]) = difference.seeds {
        text += &format!(", seeds {:+.1} to {:+.1}", least * 100.0, most * 100.0);
    }
    text
}

fn fewer(effect: &Effect) -> String {
    match &effect.fewer {
        None => "no percentage: below 40".into(),
        Some(fewer) if fewer.value < 0.0 => "more".into(),
        Some(fewer) => {
            let interval = fewer.interval.map_or(String::new(), |[low, high]| {
                format!(" ({:.1} to {:.1} %)", low * 100.0, high * 100.0)
            });
            format!("{:.1} %{interval}", fewer.value * 100.0)
        }
    }
}

fn actions(label: &LabelReport) -> String {
    let counts = label.actions.iter();
    let counts: Vec<String> = counts.map(|(action, n)| format!("{action} {n}")).collect();
    counts.join(", ")
}

fn figures(set: &PolicySet, index: usize) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (number, setting) in set.settings.iter().enumerate() {
        let shown = shown(&setting.categories);
        if shown.is_empty() {
            continue;
        }
        let which = match shown.len() < setting.categories.len() {
            true => format!(
                " (the {} largest of {})",
                shown.len(),
                setting.categories.len()
            ),
            false => String::new(),
        };
        let bars: Vec<Bar> = shown.into_iter().flat_map(bars).collect();
        let title = format!(
            "{}, {}: harmful answers and benign refusals by category{which}, off and enforced",
            set.data.name, setting.name
        );
        let id = format!("set-{index}-categories-{number}");
        let caption = Caption {
            id: &id,
            title: &title,
            description: "For each category a bar with the policy off and one with it enforced.",
        };
        figures.push(Figure {
            caption: title.clone(),
            svg: picture::bars(&caption, &bars),
            wide: true,
        });
    }
    figures
}

/// At most `MOST_CATEGORIES`, the largest of harmful and of benign rows: half of them each, or more
/// where the other has fewer.
fn shown(categories: &[CategoryEffect]) -> Vec<&CategoryEffect> {
    let largest = |complied: bool| {
        let of_kind = categories.iter();
        let of_kind =
            of_kind.filter(|category| (category.outcome == Outcome::Complied) == complied);
        let mut of_kind: Vec<&CategoryEffect> = of_kind.collect();
        of_kind.sort_by_key(|category| std::cmp::Reverse(category.of));
        of_kind
    };
    let (mut harmful, mut benign) = (largest(true), largest(false));
    harmful.truncate(MOST_CATEGORIES - benign.len().min(MOST_CATEGORIES / 2));
    benign.truncate(MOST_CATEGORIES - harmful.len());
    harmful.append(&mut benign);
    harmful
}

fn bars(category: &CategoryEffect) -> [Bar; 2] {
    let of = category.of.max(1) as f64;
    let bar = |name: &str, mean: f64, class| Bar {
        label: format!("{} ({name})", category.category),
        value: mean / of,
        interval: None,
        note: format!("{}, {}", count(mean, category.of), category.outcome.name()),
        class,
    };
    [
        bar("off", category.off, "s1"),
        bar("enforced", category.enforced, "s0"),
    ]
}

fn configuration_section(report: &PolicyReport) -> Section {
    let limit = report.max_tokens;
    let mut facts = vec![
        fact("policy", report.policy.clone()),
        fact("policy's hash", report.policy_hash.clone()),
        fact("library's hash", report.library_hash.clone()),
        fact("judges", report.judges.join(", ")),
        fact(
            "longest answer",
            limit.map_or("the server's default".into(), |tokens| {
                format!("{tokens} tokens")
            }),
        ),
    ];
    facts.extend(configuration(&report.configuration));
    let mut remarks = Vec::new();
    if report.judges.len() < 2 {
        remarks.push("Only one judge: \"every judge\" is its word alone.".into());
    }
    Section {
        title: "Configuration".into(),
        facts,
        remarks,
        ..Section::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_whole_where_it_can_be() {
        assert_eq!([count(3.0, 10), count(2.5, 10)], ["3 of 10", "2.5 of 10"]);
    }

    #[test]
    fn of_many_categories_the_largest_of_both_kinds_are_shown() {
        let category = |outcome, of: u64| CategoryEffect {
            label: "a",
            category: of.to_string(),
            of,
            outcome,
            off: 0.0,
            enforced: 0.0,
        };
        let of_kind = |outcome, count| (1..=count).map(move |of| category(outcome, of));
        let told = |harmful, benign| {
            let categories: Vec<_> = of_kind(Outcome::Complied, harmful)
                .chain(of_kind(Outcome::Refused, benign))
                .collect();
            let shown = shown(&categories);
            let harmful = shown.iter().filter(|c| c.outcome == Outcome::Complied);
            (harmful.count(), shown.len(), shown.first().map(|c| c.of))
        };
        assert_eq!(told(40, 90), (12, 24, Some(40)));
        assert_eq!(told(40, 3), (21, 24, Some(40)));
        assert_eq!(told(3, 40), (3, 24, Some(3)));
        assert_eq!(told(2, 2), (2, 4, Some(2)));
    }

    #[test]
    fn a_difference_has_its_sign() {
        let difference = Measured {
            value: -0.125,
            interval: Some([-0.25, 0.0]),
            seeds: Some([-0.2, 0.1]),
        };
        assert_eq!(
            points(&difference),
            "-12.5 (-25.0 to +0.0), seeds -20.0 to +10.0"
        );
    }
}
