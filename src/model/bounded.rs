//! The string functions of templates that multiply text, each with a bound on what it makes.
//! A template pays for an instruction, not for the bytes that the instruction asks for, and an
//! allocation that fails ends the process.
//! Knows Jinja's functions and Python's methods of the same names; knows no chat.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, Rest, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;

/// Longest text that one call may make, in bytes.
pub(super) const MAX_BYTES: usize = 4 << 20;
/// Most parts that one call may cut a list into.
const MAX_PARTS: usize = 100_000;
/// Digits of the widest field that a format may ask for.
const WIDTH_DIGITS: usize = 3;

/// Puts the bounded functions in the place of the library's.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.add_filter("replace", |text: &Value, from: &Value, to: &Value| {
        let [text, from, to] = [text, from, to].map(spelled);
        replaced(&text?, &from?, &to?, None)
    });
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("string", |value: &Value| spelled(value));
    environment.add_filter("format", |text: &Value, arguments: Rest<Value>| {
        check_format(&spelled(text)?, &arguments)?;
        let text = text.as_str().unwrap_or_default();
        minijinja::formatting::format(minijinja::formatting::FormatStyle::Printf, text, &arguments)
    });
    environment.add_filter(
        "batch",
        |state: &State, value: Value, count: usize, fill: Option<Value>| {
            check_parts(count)?;
            filters::batch(state, value, count, fill)
        },
    );
    environment.add_filter(
        "slice",
        |state: &State, value: Value, count: usize, fill: Option<Value>| {
            check_parts(count)?;
            filters::slice(state, value, count, fill)
        },
    );
    environment.set_unknown_method_callback(method);
}

fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    match (name, value.as_str()) {
        ("replace", Some(text)) => {
            let (from, to, count): (&str, &str, Option<i32>) = from_args(arguments)?;
            // A negative count is none, as in Python.
            let most = count.and_then(|count| usize::try_from(count).ok());
            replaced(text, from, to, most).map(Value::from)
        }
        ("join", Some(joiner)) => {
            let (items,): (&Value,) = from_args(arguments)?;
            joined(items, joiner, None).map(Value::from)
        }
        ("format", Some(text)) => {
            check_format(text, arguments)?;
            pycompat::unknown_method_callback(state, value, name, arguments)
        }
        _ => pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

/// Text that takes no more than it may hold.
#[derive(Default)]
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > MAX_BYTES {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

impl Bounded {
    fn push(&mut self, value: impl fmt::Display) -> Result<(), Error> {
        write!(self, "{value}").map_err(|_| too_long())
    }
}

fn too_long() -> Error {
    let message = format!("a text longer than {MAX_BYTES} bytes");
    Error::new(ErrorKind::OutOfFuel, message)
}

fn spelled(value: &Value) -> Result<String, Error> {
    let mut text = Bounded::default();
    text.push(value)?;
    Ok(text.0)
}

/// `most` unset replaces all.
fn replaced(text: &str, from: &str, to: &str, most: Option<usize>) -> Result<String, Error> {
    let most = most.unwrap_or(usize::MAX);
    let found = text.matches(from).take(most).count();
    let length = found
        .checked_mul(to.len())
        .and_then(|added| added.checked_add(text.len()));
    match length {
        Some(length) if length <= MAX_BYTES => Ok(text.replacen(from, to, most)),
        _ => Err(too_long()),
    }
}

fn join(
    items: &Value,
    joiner: Option<Value>,
    attribute: Option<String>,
    options: Kwargs,
) -> Result<String, Error> {
    let joiner = match joiner {
        Some(joiner) => Some(joiner),
        None => options.get("d")?,
    };
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => options.get("attribute")?,
    };
    options.assert_all_used()?;
    let joiner = joiner.map_or(Ok(String::new()), |joiner| spelled(&joiner))?;
    joined(items, &joiner, attribute.as_deref())
}

fn joined(items: &Value, joiner: &str, attribute: Option<&str>) -> Result<String, Error> {
    let mut text = Bounded::default();
    for (index, item) in items.try_iter()?.checked().enumerate() {
        if index > 0 {
            text.push(joiner)?;
        }
        let path = attribute.into_iter().flat_map(|path| path.split('.'));
        let item = path.fold(item, |item, part| item?.get_attr(part))?;
        text.push(item)?;
    }
    Ok(text.0)
}

fn indent(
    text: &Value,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String, Error> {
    let width = width.map_or_else(|| options.get("width"), |width| Ok(Some(width)))?;
    let first = first.map_or_else(|| options.get("first"), |first| Ok(Some(first)))?;
    let blank = blank.map_or_else(|| options.get("blank"), |blank| Ok(Some(blank)))?;
    options.assert_all_used()?;
    let width = width.unwrap_or(4);
    if width > MAX_BYTES {
        return Err(too_long());
    }
    let spaces = " ".repeat(width);
    let text = spelled(text)?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let mut indented = Bounded::default();
    for (index, line) in text.split('\n').enumerate() {
        if index > 0 {
            indented.push('\n')?;
        }
        let wanted = match index {
            0 => first.unwrap_or(false),
            _ => !line.trim_end_matches('\r').is_empty() || blank.unwrap_or(false),
        };
        if wanted {
            indented.push(&spaces)?;
        }
        indented.push(line)?;
    }
    Ok(indented.0)
}

/// Refuses fields of great width, and more fields than long arguments leave room for.
fn check_format(text: &str, arguments: &[Value]) -> Result<(), Error> {
    let wide = text
        .split(|c: char| !c.is_ascii_digit())
        .any(|digits| digits.len() > WIDTH_DIGITS);
    if wide || text.contains('*') {
        return Err(too_long());
    }
    let mut longest = 10usize.pow(WIDTH_DIGITS as u32);
    for argument in arguments {
        longest = longest.max(spelled(argument)?.len());
    }
    let fields = text.matches(['%', '{']).count();
    match fields.checked_mul(longest) {
        Some(length) if length <= MAX_BYTES => Ok(()),
        _ => Err(too_long()),
    }
}

fn check_parts(count: usize) -> Result<(), Error> {
    match count {
        0..=MAX_PARTS => Ok(()),
        _ => Err(too_long()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, Error> {
        let mut environment = Environment::new();
        install(&mut environment);
        environment.render_str(template, ())
    }

    fn check(template: &str, expected: &str) {
        assert_eq!(render(template).expect(template), expected);
    }

    #[test]
    fn text_within_the_bound_is_made_as_ever() {
        check("{{ 'aXbX' | replace('X', '-') }}", "a-b-");
        check("{{ 'aXbX'.replace('X', '-', 1) }}", "a-bX");
        check("{{ 'aXbX'.replace('X', '', -1) }}", "ab");
        check("{{ [1, 'b', true] | join(', ') }}", "1, b, True");
        check(
            "{{ ['a', 'b'] | join }}{{ ['a', 'b'] | join(d='+') }}",
            "aba+b",
        );
        check("{{ '/'.join(['a', 'b']) }}", "a/b");
        check(
            "{{ [{'n': 'a'}, {'n': 'b'}] | join(',', attribute='n') }}",
            "a,b",
        );
        check("{{ 'a\nb\n\nc\n' | indent(2) }}", "a\n  b\n\n  c");
        check("{{ 'a\nb' | indent(width=1, first=true) }}", " a\n b");
        check("{{ '%s is %03d' | format('a', 7) }}", "a is 007");
        check("{{ '{} is {:>3}'.format('a', 7) }}", "a is   7");
        check("{{ [1, 2, 3] | batch(2) | length }}{{ 'a' | upper }}", "2A");
        check("{{ 7 | string }}", "7");
    }

    #[test]
    fn text_beyond_the_bound_is_an_error_and_not_asked_for() {
        for template in [
            "{{ 'Hello' | replace('', 'x' * 60000) | replace('x', 'y' * 30000) }}",
            "{{ 'Hello'.replace('', 'x' * 60000).replace('x', 'y' * 30000) }}",
            "{{ ('x' * 1000000 ~ ',').join('x' * 100000) }}",
            "{{ (['x' * 1000000] * 1000000) | join }}",
            "{{ ([{'n': 'x' * 1000000}] * 1000000) | join(attribute='n') }}",
            "{{ (['x' * 1000000] * 1000000) | string }}",
            "{{ 'x' | indent(10000000000, true) }}",
            "{{ ('x\n' * 100000) | indent(1000) }}",
            "{{ '%1000000000d' | format(1) }}",
            "{{ '%*d' | format(1000000000, 1) }}",
            "{{ '{:>1000000000}'.format(1) }}",
            "{{ ('{0}' * 1000000).format('x' * 1000000) }}",
            "{{ [1] | batch(10000000000, 'x') }}",
            "{{ [1] | slice(10000000000, 'x') }}",
        ] {
            let error = render(template).expect_err(template);
            assert_eq!(error.kind(), ErrorKind::OutOfFuel, "{template}: {error}");
        }
    }
}
