//! Whether a request is of the kind that a probe was trained on. Knows forms, not prompts.

use inwit_probes::{SystemPromptRule, TrainedOn};

/// How a request came. What a probe's `trained_on` is compared with.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptForm {
    Chat {
        template_hash: String,
        /// SHA-256 of the system prompt that the caller gave; none when it gave none.
        system_prompt: Option<String>,
        user_turns: u32,
        prefilled_answer: bool,
    },
    RawText,
    Tokens,
}

impl PromptForm {
    /// Raw text and token ids are never in a probe's domain: nobody knows their template.
    pub fn within(&self, trained_on: &TrainedOn) -> bool {
        let Self::Chat {
            template_hash,
            system_prompt,
            user_turns,
            prefilled_answer,
        } = self
        else {
            return false;
        };
        let system_prompt_fits = match &trained_on.system_prompt_rule {
            SystemPromptRule::None | SystemPromptRule::Default => system_prompt.is_none(),
            SystemPromptRule::TextHash(hash) => system_prompt.as_ref() == Some(hash),
        };
        system_prompt_fits
            && !prefilled_answer
            && *template_hash == trained_on.template_hash
            && *user_turns == trained_on.turns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: SystemPromptRule = SystemPromptRule::None;

    fn check(rule: SystemPromptRule, change: impl Fn(&mut PromptForm), within: bool) {
        let trained_on = TrainedOn {
            template_hash: "template".into(),
            system_prompt_rule: rule,
            turns: 1,
        };
        let mut form = PromptForm::Chat {
            template_hash: "template".into(),
            system_prompt: None,
            user_turns: 1,
            prefilled_answer: false,
        };
        change(&mut form);
        assert_eq!(form.within(&trained_on), within, "{form:?}, {trained_on:?}");
    }

    #[test]
    fn a_chat_like_those_of_the_training_is_within() {
        check(TEXT, |_| {}, true);
        check(SystemPromptRule::Default, |_| {}, true);
    }

    #[test]
    fn raw_text_and_tokens_are_outside() {
        check(TEXT, |form| *form = PromptForm::RawText, false);
        check(TEXT, |form| *form = PromptForm::Tokens, false);
    }

    #[test]
    fn another_template_more_turns_or_a_prefilled_answer_are_outside() {
        let change = |template: &str, turns, prefilled| {
            let template_hash = template.to_owned();
            move |form: &mut PromptForm| {
                *form = PromptForm::Chat {
                    template_hash: template_hash.clone(),
                    system_prompt: None,
                    user_turns: turns,
                    prefilled_answer: prefilled,
                }
            }
        };
        check(TEXT, change("other", 1, false), false);
        check(TEXT, change("template", 2, false), false);
        check(TEXT, change("template", 1, true), false);
    }

    #[test]
    fn only_the_system_prompt_of_the_training_is_within() {
        let system = |text: &str| {
            let text = text.to_owned();
            move |form: &mut PromptForm| {
                if let PromptForm::Chat { system_prompt, .. } = form {
                    *system_prompt = Some(text.clone());
                }
            }
        };
        let rule = || SystemPromptRule::TextHash("abc".into());
        check(rule(), system("abc"), true);
        check(rule(), system("abd"), false);
        check(rule(), |_| {}, false);
        check(SystemPromptRule::Default, system("abc"), false);
    }
}
