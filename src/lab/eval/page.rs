//! A report as people read it: sections of facts, tables, remarks and pictures.
//! The terminal shows its tables, the page all of it.

use serde::Serialize;

#[derive(Clone, Debug, Default, Serialize)]
pub struct Page {
    pub title: String,
    /// One sentence.
    pub lead: String,
    pub sections: Vec<Section>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Section {
    pub title: String,
    pub facts: Vec<[String; 2]>,
    pub remarks: Vec<String>,
    pub tables: Vec<Table>,
    pub claims: Vec<String>,
    pub figures: Vec<Figure>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Table {
    pub caption: String,
    pub head: Vec<String>,
    /// The first cell names the row.
    pub rows: Vec<Vec<String>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub caption: String,
    /// Made by `picture`, which escapes what it is given.
    pub svg: String,
    /// Takes the whole width.
    pub wide: bool,
}

impl Table {
    pub fn new(caption: impl Into<String>, head: &[&str]) -> Self {
        Self {
            caption: caption.into(),
            head: head.iter().map(|cell| (*cell).to_owned()).collect(),
            rows: Vec::new(),
        }
    }
}

pub fn fact(name: &str, value: impl Into<String>) -> [String; 2] {
    [name.to_owned(), value.into()]
}
