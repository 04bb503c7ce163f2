//! Names the places of the forward pass that can be read or changed.
//! Knows their spelling and their order; knows nothing of what is done there.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A named place in the forward pass, in TransformerLens's spelling.
///
/// Sites order as a pass visits them. Each holds `[rows, d_model]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Site {
    /// `hook_embed`: the token embeddings, after any scaling.
    Embed,
    /// `blocks.{i}.hook_resid_pre`: what enters the block.
    ResidPre(u16),
    /// `blocks.{i}.hook_resid_mid`: `resid_pre + attn_out`.
    ResidMid(u16),
    /// `blocks.{i}.hook_resid_post`: `resid_mid + mlp_out`.
    ResidPost(u16),
    /// `blocks.{i}.hook_attn_out`: what attention adds to the residual.
    AttnOut(u16),
    /// `blocks.{i}.hook_mlp_out`: what the MLP adds to the residual.
    MlpOut(u16),
    /// `ln_final.hook_normalized`: what the language-model head reads.
    FinalNorm,
}

const SITES_PER_LAYER: usize = 5;

impl Site {
    /// How many sites a model of `n_layers` has; every `index` is below it.
    pub fn count(n_layers: usize) -> usize {
        n_layers.saturating_mul(SITES_PER_LAYER).saturating_add(2)
    }

    /// The place in the order of a pass: 0 is the embedding, the last is the final norm.
    /// Only meaningful for a site that `check` accepts.
    pub fn index(self, n_layers: usize) -> usize {
        match self.layer_and_step() {
            Some((layer, step)) => 1 + SITES_PER_LAYER * usize::from(layer) + step,
            None if self == Self::Embed => 0,
            None => Self::count(n_layers) - 1,
        }
    }

    pub fn layer(self) -> Option<usize> {
        self.layer_and_step().map(|(layer, _)| usize::from(layer))
    }

    /// Every site of a model, in the order of a pass.
    pub fn all(n_layers: usize) -> impl Iterator<Item = Self> {
        // A layer number is a u16, so no site exists beyond that.
        let layers = 0..u16::try_from(n_layers).unwrap_or(u16::MAX);
        let of_layer = |i| {
            [
                Self::ResidPre(i),
                Self::AttnOut(i),
                Self::ResidMid(i),
                Self::MlpOut(i),
                Self::ResidPost(i),
            ]
        };
        std::iter::once(Self::Embed)
            .chain(layers.flat_map(of_layer))
            .chain(std::iter::once(Self::FinalNorm))
    }

    /// Refuses a layer that the model does not have.
    pub fn check(self, n_layers: usize) -> Result<()> {
        match self.layer() {
            Some(layer) if layer >= n_layers => Err(Error::invalid(
                "site",
                format!(
                    "`{self}` is beyond the model's {n_layers} layers; the last is `{}`",
                    n_layers.checked_sub(1).map_or_else(
                        || Self::Embed.to_string(),
                        |last| format!("blocks.{last}.hook_resid_post")
                    )
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The layer, and the place within it in the order of a pass.
    fn layer_and_step(self) -> Option<(u16, usize)> {
        match self {
            Self::Embed | Self::FinalNorm => None,
            Self::ResidPre(i) => Some((i, 0)),
            Self::AttnOut(i) => Some((i, 1)),
            Self::ResidMid(i) => Some((i, 2)),
            Self::MlpOut(i) => Some((i, 3)),
            Self::ResidPost(i) => Some((i, 4)),
        }
    }
}

impl Ord for Site {
    fn cmp(&self, other: &Self) -> Ordering {
        // With as many layers as can be named, the final norm comes after all of them.
        let layers = usize::from(u16::MAX) + 1;
        self.index(layers).cmp(&other.index(layers))
    }
}

impl PartialOrd for Site {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embed => f.write_str("hook_embed"),
            Self::ResidPre(i) => write!(f, "blocks.{i}.hook_resid_pre"),
            Self::ResidMid(i) => write!(f, "blocks.{i}.hook_resid_mid"),
            Self::ResidPost(i) => write!(f, "blocks.{i}.hook_resid_post"),
            Self::AttnOut(i) => write!(f, "blocks.{i}.hook_attn_out"),
            Self::MlpOut(i) => write!(f, "blocks.{i}.hook_mlp_out"),
            Self::FinalNorm => f.write_str("ln_final.hook_normalized"),
        }
    }
}

impl FromStr for Site {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "hook_embed" => return Ok(Self::Embed),
            "ln_final.hook_normalized" => return Ok(Self::FinalNorm),
            _ => {}
        }
        text.strip_prefix("blocks.")
            .and_then(|rest| rest.split_once('.'))
            .and_then(|(layer, hook)| {
                let layer: u16 = layer.parse().ok()?;
                match hook {
                    "hook_resid_pre" => Some(Self::ResidPre(layer)),
                    "hook_resid_mid" => Some(Self::ResidMid(layer)),
                    "hook_resid_post" => Some(Self::ResidPost(layer)),
                    "hook_attn_out" => Some(Self::AttnOut(layer)),
                    "hook_mlp_out" => Some(Self::MlpOut(layer)),
                    _ => None,
                }
            })
            // One spelling per site: `blocks.+7.…` and `blocks.07.…` are not names.
            .filter(|site| site.to_string() == text)
            .ok_or_else(|| unknown(text))
    }
}

fn unknown(text: &str) -> Error {
    let shown: String = text.chars().take(80).collect();
    Error::invalid(
        "site",
        format!(
            "unknown site {shown:?}; expected e.g. `blocks.7.hook_resid_post`, \
             `blocks.7.hook_mlp_out`, `hook_embed` or `ln_final.hook_normalized`"
        ),
    )
}

impl TryFrom<String> for Site {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Site> for String {
    fn from(site: Site) -> Self {
        site.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_site_round_trips_through_its_name() {
        for site in Site::all(3) {
            assert_eq!(site.to_string().parse::<Site>().unwrap(), site);
            let json = serde_json::to_string(&site).unwrap();
            assert_eq!(json, format!("\"{site}\""));
            assert_eq!(serde_json::from_str::<Site>(&json).unwrap(), site);
        }
    }

    #[test]
    fn sites_come_in_the_order_of_a_pass_and_their_indices_are_dense() {
        let sites: Vec<_> = Site::all(4).collect();
        assert!(sites.windows(2).all(|pair| pair[0] < pair[1]));
        let indices: Vec<_> = sites.iter().map(|site| site.index(4)).collect();
        assert_eq!(indices, (0..Site::count(4)).collect::<Vec<_>>());
    }

    #[test]
    fn a_block_runs_attention_before_the_mlp() {
        let mut sites = [
            Site::ResidPost(2),
            Site::MlpOut(2),
            Site::ResidMid(2),
            Site::AttnOut(2),
            Site::ResidPre(2),
        ];
        sites.sort();
        assert_eq!(
            sites.map(|site| site.index(30)),
            [11, 12, 13, 14, 15],
            "resid_pre, attn_out, resid_mid, mlp_out, resid_post"
        );
        assert_eq!(sites[1], Site::AttnOut(2));
    }

    #[test]
    fn the_final_norm_comes_after_the_last_nameable_layer() {
        assert!(Site::FinalNorm > Site::ResidPost(u16::MAX));
        assert_eq!(Site::FinalNorm.index(30), Site::count(30) - 1);
        assert_eq!(Site::FinalNorm.layer(), None);
        assert_eq!(Site::MlpOut(7).layer(), Some(7));
    }

    #[test]
    fn an_unknown_spelling_is_answered_with_an_example() {
        for text in [
            "",
            "layers.7",
            "blocks.7",
            "blocks.-1.hook_resid_pre",
            "blocks.+7.hook_resid_pre",
            "blocks.07.hook_resid_pre",
            "blocks.65536.hook_resid_pre",
            "blocks.7.hook_resid_post ",
            "blocks.7.attn.hook_z",
        ] {
            let message = text.parse::<Site>().unwrap_err().to_string();
            assert!(
                message.contains("expected e.g. `blocks.7.hook_resid_post`"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_layer_beyond_the_model_is_refused() {
        assert!(Site::ResidPost(29).check(30).is_ok());
        assert!(Site::FinalNorm.check(0).is_ok());
        let message = Site::ResidPost(30).check(30).unwrap_err().to_string();
        assert!(message.contains("blocks.29.hook_resid_post"), "{message}");
    }

    proptest! {
        #[test]
        fn parsing_any_text_never_panics(text in ".{0,64}") {
            if let Ok(site) = text.parse::<Site>() {
                prop_assert_eq!(site.to_string(), text);
            }
        }
    }
}
