//! Offline work on an engine: answer, score and capture files of prompts; fit what acts on them.
//! Knows files and the engine's handle; knows no command line and no wire.

pub mod capture_file;
pub mod output;
pub mod refusal_head;
pub mod rows;
mod seeded;
