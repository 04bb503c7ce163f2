//! Evaluation: how well a probe or a policy does on labelled sets, beside what it must beat.
//!
//! | module | what it does |
//! |---|---|
//! | `set` | a labelled file as an evaluation sees it |
//! | `reading` | a probe's gathered logits on a set |
//! | `words`, `logistic` | the bag of words and the plain logistic regression under it |
//! | `baseline`, `recipe` | length only, bag of words, and SafeSwitch's own recipe |
//! | `measure` | rates, AUROC, calibration, each with its interval |
//! | `claim` | when one may be called better than another |
//! | `probe` | the evaluation of a probe |
//! | `layers` | a sweep over sites that was made elsewhere |
//! | `trial`, `effect`, `policy` | answers with a policy and without it, what that changes, and its evaluation |
//! | `report` | what a probe's report holds |
//! | `page`, `probe_page`, `policy_page` | the report as people read it: facts, tables, pictures |
//! | `picture`, `html` | the pictures, and all of it as one file |
//! | `ledger` | the file that remembers every run on a set |
//!
//! Reports hold numbers, hashes and file names, never a prompt or an answer.

pub mod baseline;
pub mod claim;
pub mod effect;
pub mod html;
pub mod layers;
pub mod ledger;
pub mod logistic;
pub mod measure;
pub mod page;
pub mod picture;
pub mod policy;
pub mod policy_page;
pub mod probe;
pub mod probe_page;
pub mod reading;
pub mod recipe;
pub mod report;
pub mod set;
pub mod trial;
pub mod words;
