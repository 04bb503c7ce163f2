//! Offline work on an engine: answer, score and capture files of prompts; fit what acts on them; measure.
//! Knows files and the engine's handle; knows no command line and no wire.

pub mod answer;
pub mod bench;
pub mod benchmark;
pub mod capture;
pub mod capture_file;
pub mod collect;
pub mod collected;
pub mod curve;
pub mod eval;
pub mod examples;
pub mod fit;
pub mod judge;
pub mod label;
pub mod learn;
pub mod load;
pub mod machine;
pub mod make_head;
pub mod monitoring;
pub mod output;
pub mod paired;
pub mod plot;
pub mod quality;
pub mod ranking_plot;
pub mod refusal_head;
pub mod rows;
pub mod score;
pub mod scored;
mod seeded;
pub mod states;
pub mod statistics;
pub mod sweep;
pub mod threshold;
pub mod two_layer;
pub mod vector;
pub mod workload;
