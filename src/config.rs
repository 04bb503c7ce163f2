//! Flags, environment and file become one checked [`Config`]; an error says which of them set the bad value.
//! Knows what may be asked for, not what is done with it.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::read_text;

const PREFIX: &str = "INWIT_";
/// Variables with our prefix that are no settings.
const OTHER_VARIABLES: [&str; 3] = ["INWIT_CONFIG", "INWIT_CACHE", "INWIT_LOG"];
const TEST_PREFIX: &str = "INWIT_TEST_";

const DEFAULTS: [(&str, &str); 23] = [
    ("model", "smollm2-135m-instruct"),
    ("listen", "127.0.0.1:50051"),
    ("http_listen", "127.0.0.1:9464"),
    ("max_connections", "1024"),
    ("mode", "shadow"),
    ("policy", "auto"),
    ("overrides", "refuse"),
    ("library", "shipped"),
    ("weights", "auto"),
    ("kv", "auto"),
    ("device", "cpu"),
    ("threads", "auto"),
    ("max_running", "16"),
    ("max_waiting", "64"),
    ("step_token_budget", "512"),
    ("prefill_share", "55"),
    ("kv_memory", "auto"),
    ("context_limit", "auto"),
    ("max_tokens_default", "512"),
    ("default_deadline", "120s"),
    ("max_deadline", "600s"),
    ("drain_grace", "30s"),
    ("log_format", "text"),
];

const DURATION_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
const SIZE_UNITS: [(&str, u64); 8] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
];
const MAX_FILE_BYTES: u64 = 1 << 20;
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What `serve` takes. Each is also a key of the file (`max_running`) and a variable (`INWIT_MAX_RUNNING`).
#[derive(Args, Clone, Debug, Default, Serialize)]
pub struct Flags {
    /// TOML file with settings; also INWIT_CONFIG. Flags beat variables, variables beat the file
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Print the settings that would count, as TOML, and exit
    #[arg(long)]
    #[serde(skip)]
    pub print_config: bool,

    /// Check the settings and exit
    #[arg(long)]
    #[serde(skip)]
    pub check_config: bool,

    /// A GGUF file, a Hugging Face folder, or a known name [default: smollm2-135m-instruct]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// Address for gRPC; port 0 takes a free one [default: 127.0.0.1:50051]
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<String>,

    /// Address for /metrics and /health over HTTP, or `off` [default: 127.0.0.1:9464]
    #[arg(long, value_name = "ADDRESS")]
    pub http_listen: Option<String>,

    /// gRPC connections at once; more wait to be taken [default: 1024]
    #[arg(long, value_name = "NUMBER")]
    pub max_connections: Option<String>,

    /// What to do with verdicts: `enforce`, `shadow` (decide and record) or `off` [default: shadow]
    #[arg(long, value_name = "MODE")]
    pub mode: Option<String>,

    /// Name of a policy of the library, a .toml file, `off` for the empty one, or `auto` [default: auto]
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<String>,

    /// What to do with a request that asks for another policy or a weaker mode while the server
    /// enforces: `refuse` or `allow` [default: refuse]
    #[arg(long, value_name = "WHAT")]
    pub overrides: Option<String>,

    /// Folder with probes, vectors, refusal heads and policies, or `shipped` [default: shipped]
    #[arg(long, value_name = "FOLDER")]
    pub library: Option<String>,

    /// How to hold the weights: `auto` (as in the file where that is exact), `f32`, `bf16`, `q8_0`, `q4_1` or `as-is` [default: auto]
    #[arg(long, value_name = "FORMAT")]
    pub weights: Option<String>,

    /// How to hold keys and values: `auto`, `f32`, `bf16` (half the memory) or `bf16-i8` (values in 8 bits) [default: auto]
    #[arg(long, value_name = "TYPE")]
    pub kv: Option<String>,

    /// Where to compute: `cpu` or `cuda:N` [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,

    /// Threads that compute, or `auto` for one per core [default: auto]
    #[arg(long, value_name = "NUMBER")]
    pub threads: Option<String>,

    /// Requests that are computed at once, 1 to 1024 [default: 16]
    #[arg(long, value_name = "NUMBER")]
    pub max_running: Option<String>,

    /// Requests that may wait; more are refused with RESOURCE_EXHAUSTED [default: 64]
    #[arg(long, value_name = "NUMBER")]
    pub max_waiting: Option<String>,

    /// Most tokens of one pass [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub step_token_budget: Option<String>,

    /// How much of a pass's time may go to prompts while other requests are being answered, 1 to 100 [default: 60]
    #[arg(long, value_name = "PERCENT")]
    pub prefill_share: Option<String>,

    /// Memory for keys and values, such as 2GiB, or `auto` [default: auto]
    #[arg(long, value_name = "SIZE")]
    pub kv_memory: Option<String>,

    /// Longest prompt and answer together, or `auto` for what the model was trained on [default: auto]
    #[arg(long, value_name = "TOKENS")]
    pub context_limit: Option<String>,

    /// Longest answer to a request that sets no max_tokens [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub max_tokens_default: Option<String>,

    /// Deadline of a request that brings none, such as 120s [default: 120s]
    #[arg(long, value_name = "TIME")]
    pub default_deadline: Option<String>,

    /// Longest deadline a request may bring; more counts as this [default: 600s]
    #[arg(long, value_name = "TIME")]
    pub max_deadline: Option<String>,

    /// How long running requests may take after SIGTERM [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub drain_grace: Option<String>,

    /// How log lines look: `text` or `json` [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
}

/// Checked settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub model: String,
    pub listen: SocketAddr,
    /// `None` is off.
    pub http_listen: Option<SocketAddr>,
    pub max_connections: usize,
    pub mode: Mode,
    pub policy: PolicyChoice,
    pub overrides: Overrides,
    /// `None` is the shipped one.
    pub library: Option<PathBuf>,
    pub weights: Weights,
    pub kv: KvType,
    pub device: Device,
    /// `None` is one per core.
    pub threads: Option<usize>,
    pub max_running: usize,
    pub max_waiting: usize,
    pub step_token_budget: usize,
    /// In percent.
    pub prefill_share: u8,
    /// In bytes; `None` is what fits beside the weights.
    pub kv_memory: Option<u64>,
    /// In tokens; `None` is the model's own.
    pub context_limit: Option<usize>,
    pub max_tokens_default: u32,
    pub default_deadline: Duration,
    pub max_deadline: Duration,
    pub drain_grace: Duration,
    pub log_format: LogFormat,
}

/// A closed choice, spelled in snake_case.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($variant),+ }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text),+ })
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(format!("must be one of {}", [$($text),+].join(", "))),
                }
            }
        }
    };
}

choice!(
    /// What to do with verdicts.
    Mode { Off = "off", Shadow = "shadow", Enforce = "enforce" }
);
choice!(
    /// What to do with a request that asks for another policy or a weaker mode while the server enforces.
    Overrides { Refuse = "refuse", Allow = "allow" }
);
choice!(
    /// How to hold the weights.
    Weights { Auto = "auto", F32 = "f32", Bf16 = "bf16", Q8_0 = "q8_0", Q4_1 = "q4_1", AsIs = "as-is" }
);
choice!(
    /// How to hold keys and values.
    KvType { Auto = "auto", F32 = "f32", Bf16 = "bf16", Bf16I8 = "bf16-i8" }
);
choice!(
    /// How log lines look.
    LogFormat { Text = "text", Json = "json" }
);

/// Which policy judges a request that names none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyChoice {
    /// The library's own.
    Auto,
    /// The empty one.
    Off,
    Named(String),
    File(PathBuf),
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(usize),
}

impl Config {
    /// Defaults, then the file, then the process's environment, then `flags`.
    ///
    /// # Errors
    /// `Config`, naming the setting, where its value came from, and what it may be.
    pub fn load(flags: &Flags) -> Result<Self> {
        let environment = std::env::vars_os().filter_map(|(name, value)| {
            // A name that is no text cannot begin with ours.
            let name = name.into_string().ok()?;
            Some((name, value.to_string_lossy().into_owned()))
        });
        Self::from_layers(flags, environment)
    }

    /// Like [`Self::load`], with a given environment.
    pub fn from_layers(
        flags: &Flags,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        let environment: Vec<_> = environment
            .into_iter()
            .filter(|(name, _)| name.starts_with(PREFIX) && !name.starts_with(TEST_PREFIX))
            .collect();
        let named = environment
            .iter()
            .find(|(name, _)| name == "INWIT_CONFIG")
            .map(|(_, file)| PathBuf::from(file));
        let file = flags.config.clone().or(named);
        Layers::new(flags, environment, file.as_deref())?.check()
    }

    /// The settings as a file that gives them again.
    pub fn to_toml(&self) -> String {
        let auto = |number: Option<String>| number.unwrap_or_else(|| "auto".into());
        let texts = [
            ("model", self.model.clone()),
            ("listen", self.listen.to_string()),
            (
                "http_listen",
                self.http_listen.map_or("off".into(), |a| a.to_string()),
            ),
            ("max_connections", self.max_connections.to_string()),
            ("mode", self.mode.to_string()),
            ("policy", self.policy.to_string()),
            ("overrides", self.overrides.to_string()),
            (
                "library",
                self.library
                    .as_ref()
                    .map_or("shipped".into(), |path| path.display().to_string()),
            ),
            ("weights", self.weights.to_string()),
            ("kv", self.kv.to_string()),
            ("device", self.device.to_string()),
            ("threads", auto(self.threads.map(|n| n.to_string()))),
            ("max_running", self.max_running.to_string()),
            ("max_waiting", self.max_waiting.to_string()),
            ("step_token_budget", self.step_token_budget.to_string()),
            ("prefill_share", self.prefill_share.to_string()),
            ("kv_memory", auto(self.kv_memory.map(|n| n.to_string()))),
            (
                "context_limit",
                auto(self.context_limit.map(|n| n.to_string())),
            ),
            ("max_tokens_default", self.max_tokens_default.to_string()),
            ("default_deadline", duration_text(self.default_deadline)),
            ("max_deadline", duration_text(self.max_deadline)),
            ("drain_grace", duration_text(self.drain_grace)),
            ("log_format", self.log_format.to_string()),
        ];
        texts
            .into_iter()
            .map(|(key, text)| {
                let value = text
                    .parse()
                    .map_or_else(|_| toml::Value::String(text), toml::Value::Integer);
                format!("{key} = {value}\n")
            })
            .collect()
    }
}

impl fmt::Display for PolicyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Named(name) => f.write_str(name),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for PolicyChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("must not be empty; `off` turns the policy off".into()),
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            path if path.ends_with(".toml") => Ok(Self::File(path.into())),
            name => Ok(Self::Named(name.into())),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = match text {
            "cpu" => return Ok(Self::Cpu),
            other => other
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .ok_or("must be `cpu` or `cuda:N`")?,
        };
        if cfg!(feature = "cuda") {
            Ok(Self::Cuda(ordinal))
        } else {
            Err("this binary was built without the feature `cuda`; use `cpu`".into())
        }
    }
}

/// One source of settings, each a text.
struct Texts {
    source: &'static str,
    values: Vec<(String, String)>,
}

impl Provider for Texts {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.source)
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        let values: Dict = self
            .values
            .iter()
            .map(|(key, text)| (key.clone(), Value::from(text.clone())))
            .collect();
        Ok(Map::from([(Profile::Default, values)]))
    }
}

const DEFAULT: &str = "default";
const VARIABLE: &str = "variable";
const FLAG: &str = "flag";

/// The sources, the later ones on top.
struct Layers {
    merged: Figment,
    file: Option<String>,
}

impl Layers {
    fn new(flags: &Flags, environment: Vec<(String, String)>, file: Option<&Path>) -> Result<Self> {
        let defaults = DEFAULTS
            .iter()
            .map(|&(key, text)| (key.to_owned(), text.to_owned()))
            .collect();
        let mut merged = Figment::from(Texts {
            source: DEFAULT,
            values: defaults,
        });
        if let Some(path) = file {
            merged = merged.merge(Toml::string(&read_text(
                path,
                MAX_FILE_BYTES,
                "a configuration",
            )?));
        }
        let merged = merged
            .merge(Texts {
                source: VARIABLE,
                values: variables(environment),
            })
            .merge(Texts {
                source: FLAG,
                values: flag_texts(flags),
            });
        let layers = Self {
            merged,
            file: file.map(|path| path.display().to_string()),
        };
        layers.refuse_unknown()?;
        Ok(layers)
    }

    fn check(&self) -> Result<Config> {
        let config = Config {
            model: self.read("model", not_empty)?,
            listen: self.read("listen", address)?,
            http_listen: self.read("http_listen", unless("off", address))?,
            max_connections: self.read("max_connections", number(1..=1 << 20))?,
            mode: self.read("mode", str::parse)?,
            policy: self.read("policy", str::parse)?,
            overrides: self.read("overrides", str::parse)?,
            library: self.read("library", unless("shipped", path))?,
            weights: self.read("weights", str::parse)?,
            kv: self.read("kv", str::parse)?,
            device: self.read("device", str::parse)?,
            threads: self.read("threads", unless("auto", number(1..=1024)))?,
            max_running: self.read("max_running", number(1..=1024))?,
            max_waiting: self.read("max_waiting", number(0..=100_000))?,
            step_token_budget: self.read("step_token_budget", number(1..=1 << 20))?,
            prefill_share: self.read("prefill_share", number(1..=100))?,
            kv_memory: self.read("kv_memory", unless("auto", size))?,
            context_limit: self.read("context_limit", unless("auto", number(2..=1 << 24)))?,
            max_tokens_default: self.read("max_tokens_default", number(1..=1 << 24))?,
            default_deadline: self.read("default_deadline", duration(1))?,
            max_deadline: self.read("max_deadline", duration(1))?,
            drain_grace: self.read("drain_grace", duration(0))?,
            log_format: self.read("log_format", str::parse)?,
        };
        if config.default_deadline > config.max_deadline {
            return Err(self.bad("default_deadline", "must not be longer than max_deadline"));
        }
        // Each running request decodes one token per pass.
        if config.step_token_budget < config.max_running {
            return Err(self.bad("step_token_budget", "must be at least max_running"));
        }
        if config.listen.port() != 0 && config.http_listen == Some(config.listen) {
            return Err(self.bad("http_listen", "must differ from listen; `off` turns it off"));
        }
        Ok(config)
    }

    fn read<T>(&self, key: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<T> {
        let text = self
            .text(key)
            .ok_or_else(|| self.bad(key, "must be a text or a whole number"))?;
        parse(&text).map_err(|reason| self.bad(key, &reason))
    }

    fn text(&self, key: &str) -> Option<String> {
        match self.merged.find_value(key).ok()? {
            Value::String(_, text) => Some(text),
            Value::Num(_, number) => number
                .to_u128()
                .map(|n| n.to_string())
                .or_else(|| number.to_i128().map(|n| n.to_string())),
            _ => None,
        }
    }

    fn refuse_unknown(&self) -> Result<()> {
        let values: Dict = self
            .merged
            .extract()
            .map_err(|error| self.unreadable(&error))?;
        let known = |key: &str| DEFAULTS.iter().any(|&(name, _)| name == key);
        match values.keys().find(|key| !known(key)) {
            None => Ok(()),
            Some(key) => Err(Error::Config(format!(
                "{}: there is no such setting; there are {}",
                self.source(key),
                DEFAULTS.map(|(name, _)| name).join(", ")
            ))),
        }
    }

    fn unreadable(&self, error: &figment::Error) -> Error {
        Error::Config(match &self.file {
            Some(file) => format!("{file}: not readable as TOML: {}", error.kind),
            None => error.to_string(),
        })
    }

    fn bad(&self, key: &str, reason: &str) -> Error {
        let value = self.text(key).unwrap_or_else(|| "…".into());
        Error::Config(format!("{} is `{value}`: {reason}", self.source(key)))
    }

    /// The setting as its author wrote it.
    fn source(&self, key: &str) -> String {
        let source = self.merged.find_metadata(key).map(|m| m.name.as_ref());
        match source {
            Some(DEFAULT) | None => format!("the default of {key}"),
            Some(VARIABLE) => format!("the variable {PREFIX}{}", key.to_uppercase()),
            Some(FLAG) => format!("the flag --{}", key.replace('_', "-")),
            Some(_) => format!("{key} in {}", self.file.as_deref().unwrap_or("the file")),
        }
    }
}

fn variables(environment: Vec<(String, String)>) -> Vec<(String, String)> {
    environment
        .into_iter()
        .filter(|(name, _)| !OTHER_VARIABLES.contains(&name.as_str()))
        .map(|(name, text)| (name[PREFIX.len()..].to_lowercase(), text))
        .collect()
}

fn flag_texts(flags: &Flags) -> Vec<(String, String)> {
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(flags) else {
        return Vec::new();
    };
    fields
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())))
        .collect()
}

fn not_empty(text: &str) -> Result<String, String> {
    match text {
        "" => Err("must not be empty".into()),
        text => Ok(text.into()),
    }
}

fn path(text: &str) -> Result<PathBuf, String> {
    not_empty(text).map(PathBuf::from)
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "must be an address and a port, such as 127.0.0.1:50051".into())
}

/// `word` stands for none.
fn unless<T>(
    word: &'static str,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> impl FnOnce(&str) -> Result<Option<T>, String> {
    move |text| match text {
        text if text == word => Ok(None),
        text => parse(text)
            .map(Some)
            .map_err(|reason| format!("{reason}, or `{word}`")),
    }
}

fn number<T: TryFrom<u64>>(range: RangeInclusive<u64>) -> impl FnOnce(&str) -> Result<T, String> {
    move |text| {
        text.parse()
            .ok()
            .filter(|number| range.contains(number))
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| {
                format!(
                    "must be a whole number, {} to {}",
                    range.start(),
                    range.end()
                )
            })
    }
}

fn duration(at_least_ms: u64) -> impl FnOnce(&str) -> Result<Duration, String> {
    move |text| {
        with_unit(text, &DURATION_UNITS)
            .filter(|&ms| ms >= at_least_ms)
            .map(Duration::from_millis)
            .filter(|&time| time <= LONGEST)
            .ok_or_else(|| "must be a time such as 500ms, 30s, 2m, at most 24h".into())
    }
}

fn size(text: &str) -> Result<u64, String> {
    with_unit(text, &SIZE_UNITS)
        .filter(|&bytes| bytes > 0)
        .ok_or_else(|| "must be a size such as 512MiB or 2GiB".into())
}

/// A whole number and one of `units`.
fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let &(_, factor) = units.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn duration_text(time: Duration) -> String {
    match time.as_millis() {
        ms if ms % 1000 == 0 => format!("{}s", ms / 1000),
        ms => format!("{ms}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(flags: Flags, environment: &[(&str, &str)], file: Option<&str>) -> Result<Config> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("inwit.toml");
        let mut flags = flags;
        if let Some(text) = file {
            std::fs::write(&path, text).expect("written");
            flags.config = Some(path);
        }
        let environment = environment
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()));
        Config::from_layers(&flags, environment)
    }

    fn message(result: Result<Config>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn the_defaults_are_valid_and_local() {
        let config = load(Flags::default(), &[], None).expect("loads");
        assert!(config.listen.ip().is_loopback());
        assert_eq!(config.mode, Mode::Shadow);
        assert_eq!(config.policy, PolicyChoice::Auto);
        assert_eq!(config.kv_memory, None);
        assert_eq!(config.default_deadline, Duration::from_secs(120));
    }

    #[test]
    fn flags_beat_variables_and_variables_beat_the_file() {
        let flags = Flags {
            max_running: Some("3".into()),
            ..Flags::default()
        };
        let environment = [("INWIT_MAX_RUNNING", "4"), ("INWIT_MAX_WAITING", "5")];
        let file = "max_running = 6\nmax_waiting = 7\nstep_token_budget = 8";
        let config = load(flags, &environment, Some(file)).expect("loads");
        assert_eq!(
            (
                config.max_running,
                config.max_waiting,
                config.step_token_budget
            ),
            (3, 5, 8)
        );
    }

    #[test]
    fn an_error_says_where_the_value_came_from() {
        let flags = Flags {
            max_running: Some("0".into()),
            ..Flags::default()
        };
        let from_flag = message(load(flags, &[], None));
        assert!(
            from_flag.starts_with("the flag --max-running is `0`: "),
            "{from_flag}"
        );

        let from_variable = message(load(Flags::default(), &[("INWIT_LISTEN", "here")], None));
        assert!(
            from_variable.starts_with("the variable INWIT_LISTEN is `here`: "),
            "{from_variable}"
        );

        let from_file = message(load(Flags::default(), &[], Some("kv = \"f16\"")));
        assert!(from_file.starts_with("kv in "), "{from_file}");
        assert!(
            from_file.contains("inwit.toml is `f16`: must be one of auto, f32, bf16"),
            "{from_file}"
        );
    }

    #[test]
    fn an_unknown_setting_is_an_error_in_file_and_environment() {
        let from_file = message(load(Flags::default(), &[], Some("lisen = \"127.0.0.1:1\"")));
        assert!(from_file.starts_with("lisen in "), "{from_file}");
        assert!(from_file.contains("no such setting"), "{from_file}");
        let from_variable = message(load(Flags::default(), &[("INWIT_LISEN", "x")], None));
        assert!(
            from_variable.starts_with("the variable INWIT_LISEN"),
            "{from_variable}"
        );
        assert!(
            load(
                Flags::default(),
                &[("INWIT_CACHE", "/tmp/x"), ("HOME", "x")],
                None
            )
            .is_ok()
        );
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (key, value) in [
            ("model", ""),
            ("listen", "localhost"),
            ("http_listen", "127.0.0.1:50051"),
            ("http_listen", "yes"),
            ("mode", "Enforce"),
            ("policy", ""),
            ("overrides", "yes"),
            ("weights", "q4"),
            ("device", "cuda"),
            ("device", "tpu:0"),
            ("threads", "0"),
            ("max_running", "-1"),
            ("max_running", "1025"),
            ("max_running", "1.5"),
            ("max_running", "99999999999999999999999"),
            ("max_waiting", "1000000"),
            ("max_connections", "0"),
            ("step_token_budget", "15"),
            ("kv_memory", "0"),
            ("kv_memory", "2 gigs"),
            ("kv_memory", "99999999999GiB"),
            ("context_limit", "1"),
            ("max_tokens_default", "0"),
            ("default_deadline", "0s"),
            ("default_deadline", "120"),
            ("default_deadline", "601s"),
            ("max_deadline", "25h"),
            ("log_format", "xml"),
        ] {
            let name = format!("INWIT_{}", key.to_uppercase());
            let error = message(load(Flags::default(), &[(&name, value)], None));
            assert!(error.contains(&name), "{key} = {value}: {error}");
        }
    }

    #[test]
    fn sizes_and_times_take_units() {
        let file = "kv_memory = \"2 GiB\"\ndrain_grace = \"1500ms\"\nmax_deadline = \"1h\"";
        let config = load(Flags::default(), &[], Some(file)).expect("loads");
        assert_eq!(config.kv_memory, Some(2 << 30));
        assert_eq!(config.drain_grace, Duration::from_millis(1500));
        assert_eq!(config.max_deadline, Duration::from_secs(3600));
        let plain = load(Flags::default(), &[], Some("kv_memory = 1048576")).expect("loads");
        assert_eq!(plain.kv_memory, Some(1 << 20));
    }

    #[test]
    fn a_policy_is_a_name_a_file_or_off() {
        let policy = |text| {
            load(Flags::default(), &[("INWIT_POLICY", text)], None)
                .expect("loads")
                .policy
        };
        assert_eq!(policy("off"), PolicyChoice::Off);
        assert_eq!(policy("007"), PolicyChoice::Named("007".into()));
        assert_eq!(
            policy("my/own.toml"),
            PolicyChoice::File("my/own.toml".into())
        );
    }

    #[test]
    fn the_printed_settings_give_the_same_settings() {
        let file = "http_listen = \"off\"\nkv_memory = \"3MiB\"\nmodel = \"a \\\"b\\\".gguf\"\n\
            policy = \"p.toml\"\nthreads = 2\ndrain_grace = \"1ms\"\nlibrary = \"l\"";
        let config = load(Flags::default(), &[], Some(file)).expect("loads");
        let again = load(Flags::default(), &[], Some(&config.to_toml())).expect("loads");
        assert_eq!(config, again);
    }

    #[test]
    fn a_file_that_is_no_toml_or_not_there_is_named() {
        let error = message(load(Flags::default(), &[], Some("listen = = 1")));
        assert!(
            error.contains("inwit.toml: not readable as TOML"),
            "{error}"
        );
        let flags = Flags {
            config: Some("/nowhere/inwit.toml".into()),
            ..Flags::default()
        };
        assert!(message(load(flags, &[], None)).contains("/nowhere/inwit.toml"));
        // Endless, whatever its length says.
        let flags = Flags {
            config: Some("/dev/zero".into()),
            ..Flags::default()
        };
        assert!(message(load(flags, &[], None)).contains("not a plain file"));
    }

    #[test]
    fn every_default_has_a_flag() {
        let command = Flags::augment_args(clap::Command::new("serve"));
        for (key, _) in DEFAULTS {
            let flag = key.replace('_', "-");
            assert!(
                command.get_arguments().any(|a| a.get_long() == Some(&flag)),
                "--{flag}"
            );
        }
    }
}
