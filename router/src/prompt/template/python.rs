//! What Python prints: floats, JSON and times, for templates that must render byte for byte as it does.
//!
//! `float` follows `repr(float)`, `JsonStyle` follows `json.dumps`, `strftime` follows the C locale in UTC
//! (transformers uses local time; a router's time zone should not change what a model reads). Depth, length and unknown
//! directives are refused.

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

/// Deepest nesting of a value turned into JSON; request bodies are limited to 128 by their parser.
const DEPTH_MAX: usize = 200;

/// Under which name a rendering keeps how many bytes of JSON it has made.
const JSON_BYTES: &str = "json_bytes";

/// Appends one item of a list or an object.
type WriteItem<'a> = dyn Fn(&Value, &mut Room) -> Result<(), Error> + 'a;

/// `repr(value)`: the shortest digits that read back the same, scientific from 1e16 and below 1e-4.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Arguments of `json.dumps`.
#[derive(Debug)]
pub(super) struct JsonStyle {
    /// Escape what is not ASCII.
    pub(super) ascii: bool,
    /// Sort keys.
    pub(super) sorted: bool,
    /// One level of indentation; `None` is one line.
    pub(super) indent: Option<String>,
    /// Between items.
    pub(super) item: String,
    /// Between key and value.
    pub(super) key: String,
}

impl JsonStyle {
    /// `value` as JSON, as long as that and what this rendering has made before are at most `max` bytes: a list can claim
    /// a hundred million items, and a template can turn it into JSON again and again.
    pub(super) fn json(&self, state: &mut State<'_, '_>, value: &Value, max: usize) -> Result<String, Error> {
        let made = state.get_temp(JSON_BYTES).map_or(Ok(0), usize::try_from)?;
        let mut room = Room { bytes: max.saturating_sub(made), output: String::new() };
        self.write(value, 0, &mut room)?;
        state.set_temp(JSON_BYTES, Value::from(made + room.output.len()));
        Ok(room.output)
    }

    /// Appends `value`, which is nested `depth` deep.
    fn write(&self, value: &Value, depth: usize, output: &mut Room) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            let message = format!("tojson: nested deeper than {DEPTH_MAX}");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        match value.kind() {
            ValueKind::None => output.push("null"),
            ValueKind::Bool => output.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => output.push(&value.to_string()),
            ValueKind::Number => output.push(&json_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), output),
            ValueKind::Seq | ValueKind::Iterable => {
                let write = |item: &Value, output: &mut Room| self.write(item, depth + 1, output);
                self.enclose(["[", "]"], (value.try_iter()?, &write), depth, output)
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                let write = |key: &Value, output: &mut Room| {
                    match key.as_str() {
                        Some(name) => self.string(name, output)?,
                        None => {
                            let mut name = Room { bytes: output.bytes, output: String::new() };
                            self.write(key, depth + 1, &mut name)?;
                            self.string(&name.output, output)?;
                        }
                    }
                    output.push(&self.key)?;
                    self.write(&value.get_item(key)?, depth + 1, output)
                };
                self.enclose(["{", "}"], (keys.into_iter(), &write), depth, output)
            }
            kind => {
                let message = format!("tojson: {kind} is not JSON serializable");
                Err(Error::new(ErrorKind::InvalidOperation, message))
            }
        }
    }

    fn enclose(
        &self,
        [open, close]: [&str; 2],
        (items, write): (impl Iterator<Item = Value>, &WriteItem<'_>),
        depth: usize,
        output: &mut Room,
    ) -> Result<(), Error> {
        output.push(open)?;
        let mut is_empty = true;
        for item in items {
            if !is_empty {
                output.push(&self.item)?;
            }
            is_empty = false;
            self.line(depth + 1, output)?;
            write(&item, output)?;
        }
        if !is_empty {
            self.line(depth, output)?;
        }
        output.push(close)
    }

    /// Begins a line, if there are to be several.
    fn line(&self, depth: usize, output: &mut Room) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        output.push("\n")?;
        (0..depth).try_for_each(|_| output.push(indent))
    }

    fn string(&self, text: &str, output: &mut Room) -> Result<(), Error> {
        output.fits(text.len())?;
        let text = self.escaped(text);
        ["\"", &text, "\""].into_iter().try_for_each(|part| output.push(part))
    }

    fn escaped(&self, text: &str) -> String {
        let mut output = String::with_capacity(text.len());
        for character in text.chars() {
            match character {
                '"' => output.push_str("\\\""),
                '\\' => output.push_str("\\\\"),
                '\n' => output.push_str("\\n"),
                '\r' => output.push_str("\\r"),
                '\t' => output.push_str("\\t"),
                '\u{8}' => output.push_str("\\b"),
                '\u{c}' => output.push_str("\\f"),
                control if control < ' ' => escape(control, &mut output),
                other if self.ascii && !(' '..='~').contains(&other) => escape(other, &mut output),
                plain => output.push(plain),
            }
        }
        output
    }
}

/// Where JSON is written, and how much of it there may be.
struct Room {
    bytes: usize,
    output: String,
}

impl Room {
    fn fits(&self, bytes: usize) -> Result<(), Error> {
        if bytes <= self.bytes.saturating_sub(self.output.len()) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidOperation, "tojson: too many bytes of JSON in one rendering"))
    }

    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.fits(text.len())?;
        self.output.push_str(text);
        Ok(())
    }
}

fn escape(character: char, output: &mut String) {
    let mut units = [0; 2];
    for unit in character.encode_utf16(&mut units) {
        output.push_str(&format!("\\u{unit:04x}"));
    }
}

fn json_float(value: f64) -> String {
    match float(value).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        finite => finite.to_owned(),
    }
}

/// Methods of Python's strings: those minijinja-contrib knows, and the rest that templates use.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args);
    };
    let three = |parts: [&str; 3]| Value::from(parts.map(str::to_owned).to_vec());
    Ok(match name {
        "rsplit" => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
            let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
            Value::from(rsplit(text, separator, limit)?)
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = text.split_once(separator);
            parts.map_or(three([text, "", ""]), |(before, after)| three([before, separator, after]))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = text.rsplit_once(separator);
            parts.map_or(three(["", "", text]), |(before, after)| three([before, separator, after]))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            let zeros = width.min(ZFILL_MAX).saturating_sub(text.chars().count());
            Value::from(format!("{sign}{}{digits}", "0".repeat(zeros)))
        }
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// Widest `zfill`, in characters.
const ZFILL_MAX: usize = 1000;

/// `str.rsplit(separator, limit)`.
fn rsplit(text: &str, separator: Option<&str>, limit: usize) -> Result<Vec<String>, Error> {
    let mut parts: Vec<String> = match separator {
        Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "rsplit: empty separator")),
        Some(separator) => text.rsplitn(limit.saturating_add(1), separator).map(str::to_owned).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() {
                match rest.rfind(char::is_whitespace).filter(|_| parts.len() < limit) {
                    Some(at) => {
                        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                        parts.push(rest[at + width..].to_owned());
                        rest = rest[..at].trim_end();
                    }
                    None => {
                        parts.push(rest.trim_start().to_owned());
                        rest = "";
                    }
                }
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment in UTC, split up.
#[derive(Debug)]
struct Moment {
    year: i64,
    /// 0..12
    month: usize,
    /// 1..=31
    day: i64,
    /// 0..7 from Sunday
    weekday: usize,
    /// 1..=366
    day_of_year: i64,
    second_of_day: i64,
}

impl Moment {
    /// Civil date from days since 1970-01-01 (H. Hinnant, "chrono-compatible low-level date algorithms").
    fn new(seconds: i64) -> Moment {
        let days = seconds.div_euclid(86_400);
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * from_march + 2) / 153;
        let day = from_march - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 2 } else { shifted_month - 10 };
        let year = year_of_era + era * 400 + i64::from(month < 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let day_of_year = before[month as usize] + day + i64::from(leap && month > 1);
        Moment {
            year,
            month: month as usize,
            day,
            weekday: (days + 4).rem_euclid(7) as usize,
            day_of_year,
            second_of_day: seconds.rem_euclid(86_400),
        }
    }
}

/// `datetime.strftime(format)` at `seconds` since 1970 in UTC, in the C locale.
pub(super) fn strftime(format: &str, seconds: i64) -> Result<String, Error> {
    let moment = Moment::new(seconds);
    let mut output = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            output.push(character);
            continue;
        }
        let mut directive = characters.next().unwrap_or('%');
        let unpadded = directive == '-';
        if unpadded {
            directive = characters.next().unwrap_or('-');
        }
        match field(&moment, directive) {
            Some((text, width)) if !unpadded => output.push_str(&pad(text, width)),
            Some((text, _)) => output.push_str(&text),
            None => {
                let message = format!("strftime_now: %{directive} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(output)
}

/// Zero-padded to `width`.
fn pad(text: String, width: usize) -> String {
    format!("{text:0>width$}")
}

/// A directive's text and the width it is padded to.
fn field(moment: &Moment, directive: char) -> Option<(String, usize)> {
    let (hour, minute, second) =
        (moment.second_of_day / 3600, moment.second_of_day / 60 % 60, moment.second_of_day % 60);
    let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
    let date = |separator: &str, parts: [i64; 3]| {
        let parts = parts.map(|part| format!("{part:02}"));
        parts.join(separator)
    };
    let month = moment.month as i64 + 1;
    Some(match directive {
        'Y' => (moment.year.to_string(), 4),
        'y' => ((moment.year.rem_euclid(100)).to_string(), 2),
        'm' => (month.to_string(), 2),
        'd' => (moment.day.to_string(), 2),
        'e' => (format!("{:>2}", moment.day), 0),
        'H' => (hour.to_string(), 2),
        'I' => (twelve.to_string(), 2),
        'M' => (minute.to_string(), 2),
        'S' => (second.to_string(), 2),
        'j' => (moment.day_of_year.to_string(), 3),
        'B' => (MONTHS[moment.month].to_owned(), 0),
        'b' | 'h' => (MONTHS[moment.month][..3].to_owned(), 0),
        'A' => (WEEKDAYS[moment.weekday].to_owned(), 0),
        'a' => (WEEKDAYS[moment.weekday][..3].to_owned(), 0),
        'p' => (if hour < 12 { "AM" } else { "PM" }.to_owned(), 0),
        'w' => (moment.weekday.to_string(), 0),
        'F' => (format!("{:04}-{month:02}-{:02}", moment.year, moment.day), 0),
        'T' => (date(":", [hour, minute, second]), 0),
        'D' => (date("/", [month, moment.day, moment.year.rem_euclid(100)]), 0),
        'Z' | 'z' => (String::new(), 0),
        '%' => ("%".to_owned(), 0),
        _ => return None,
    })
}
