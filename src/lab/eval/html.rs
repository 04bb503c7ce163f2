//! A page as one HTML file that needs nothing else: no script, no font, no picture from elsewhere.

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value};

use super::page::Page;
use crate::error::{Error, Result};

const TEMPLATE: &str = include_str!("report.html");

/// Renders the page. Every text is escaped; only the pictures, which escape their own, are not.
pub fn render(page: &Page) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment
        .render_str(TEMPLATE, Value::from(Serde(page)))
        .map_err(|error| Error::internal(format!("the report could not be written: {error}")))
}

#[cfg(test)]
mod tests {
    use super::super::page::{Figure, Section, Table, fact};
    use super::*;

    #[test]
    fn a_page_is_whole_and_lets_no_markup_through() {
        let mut table = Table::new("Of <b>", &["a", "b"]);
        table.rows.push(vec!["<i>".into(), "2".into()]);
        let page = Page {
            title: "A & B".into(),
            lead: "Lead.".into(),
            sections: vec![Section {
                title: "<script>".into(),
                facts: vec![fact("k", "<v>")],
                remarks: vec!["<r>".into()],
                tables: vec![table],
                claims: vec!["<c>".into()],
                figures: vec![Figure {
                    caption: "<f>".into(),
                    svg: "<svg></svg>".into(),
                    wide: false,
                }],
            }],
        };
        let html = render(&page).expect("renders");
        assert!(html.starts_with("<!doctype html>") && html.trim_end().ends_with("</html>"));
        for tag in ["<script", "<v>", "<r>", "<c>", "<f>", "<i>", "Of <b>"] {
            assert!(!html.contains(tag), "{tag}");
        }
        assert!(html.contains("A &amp; B") && html.contains("<svg></svg>"));
        for elsewhere in ["http:", "https:", "url(", "@import", " src=", "<link"] {
            assert!(!html.contains(elsewhere), "{elsewhere}");
        }
    }
}
