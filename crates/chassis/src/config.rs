//! Configuration: one JSON file, and over it the environment. It is read once, checked whole, and every problem is
//! named by its key. A problem never shows the value, which may be a secret.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use figment::Figment;
use figment::error::{Actual, Kind};
use figment::providers::{Env, Serialized};
use figment::value::{Dict, Value};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

/// What the variables of the environment begin with.
pub const PREFIX: &str = "KILN_";

/// Why a process has no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the configuration file {} can't be read", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("the configuration file {} is not JSON", path.display())]
    NotJson { path: PathBuf, source: serde_json::Error },
    #[error("the configuration file {} holds no JSON object", path.display())]
    NotAnObject { path: PathBuf },
    #[error("the configuration is wrong: {}", joined(.0))]
    Wrong(Vec<Problem>),
}

impl Error {
    /// With other names for keys that the file has by those.
    pub fn renamed(mut self, name: impl Fn(&str) -> Option<&'static str>) -> Self {
        if let Self::Wrong(problems) = &mut self {
            for problem in problems.iter_mut().filter(|problem| !problem.origin.starts_with(PREFIX)) {
                if let Some(name) = name(&problem.key) {
                    name.clone_into(&mut problem.key);
                }
            }
        }
        self
    }
}

/// One thing that is wrong with one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Dotted, as in `gateway.listen`; empty for the file as a whole.
    pub key: String,
    /// The environment variable that set it, or the file; empty where neither did.
    pub origin: String,
    pub message: String,
}

impl Problem {
    /// A problem that a later check found in a value of the right type. [`load`] adds where the value came from.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), origin: String::new(), message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "`{}`", self.key)?;
            if !self.origin.is_empty() {
                write!(f, " ({})", self.origin)?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.message)
    }
}

/// The part of the environment that is configuration: dotted key → text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// What the process was given: `KILN_A__B_C` is the key `a.b_c`. `reserved` are variables that mean something
    /// else (`KILN_LOG`), by their whole names.
    pub fn of_process(reserved: &[&str]) -> Self {
        let reserved: Vec<String> =
            reserved.iter().map(|name| name.strip_prefix(PREFIX).unwrap_or(name).to_owned()).collect();
        let variables = Env::prefixed(PREFIX)
            .filter(move |name| !reserved.iter().any(|reserved| name == reserved.as_str()))
            .split("__");
        Self(variables.iter().map(|(key, text)| (key.to_string(), text)).collect())
    }

    /// The same from pairs of key and text.
    pub fn of_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.into_iter().map(|(key, text)| (key.to_owned(), text.to_owned())).collect())
    }
}

/// Reads `file` (if there is one) and the environment over it into a `T`, then asks `check` what is wrong with the
/// values. [`Error::Wrong`] holds every problem of the whole, not the first alone.
pub fn load<T: DeserializeOwned>(
    file: Option<&Path>,
    environment: &Environment,
    check: impl FnOnce(&T) -> Vec<Problem>,
) -> Result<T, Error> {
    let keys = file.map(read).transpose()?.unwrap_or_default();
    whole(keys, file, environment, None, check)
}

/// As [`load`], of a file that is another program's and was put into our keys: of those, what `T` doesn't know is given back,
/// dotted, and refused only where a variable set it.
pub fn load_translated<T: DeserializeOwned>(
    keys: Map<String, Json>,
    file: &Path,
    environment: &Environment,
    check: impl FnOnce(&T) -> Vec<Problem>,
) -> Result<(T, Vec<String>), Error> {
    let mut unknown = Vec::new();
    let value = whole(keys, Some(file), environment, Some(&mut unknown), check)?;
    Ok((value, unknown))
}

/// The keys of a file: of a JSON object.
pub fn read(path: &Path) -> Result<Map<String, Json>, Error> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Unreadable { path: path.to_owned(), source })?;
    match serde_json::from_str(&text).map_err(|source| Error::NotJson { path: path.to_owned(), source })? {
        Json::Object(keys) => Ok(keys),
        _ => Err(Error::NotAnObject { path: path.to_owned() }),
    }
}

fn whole<T: DeserializeOwned>(
    keys: Map<String, Json>,
    file: Option<&Path>,
    environment: &Environment,
    unknown: Option<&mut Vec<String>>,
    check: impl FnOnce(&T) -> Vec<Problem>,
) -> Result<T, Error> {
    let mut figment = Figment::from(Serialized::defaults(keys));
    for (key, text) in &environment.0 {
        // Figment's own reading of a variable: numbers, booleans, lists; it takes any text.
        let value: Value = text.parse().unwrap_or_else(|never: std::convert::Infallible| match never {});
        figment = figment.merge((key.as_str(), value));
    }
    let origin = |key: &str| origin_of(key, file, environment);
    let value = figment
        .extract::<Dict>()
        .map(Value::from)
        .map_err(|error| Error::Wrong(error.into_iter().map(|e| problem_of(&e, &origin)).collect()))?;
    let config = deserialize(value, environment, &origin, unknown)?;
    let problems: Vec<Problem> = check(&config)
        .into_iter()
        .map(|problem| Problem { origin: origin(&problem.key), ..problem })
        .collect();
    if problems.is_empty() { Ok(config) } else { Err(Error::Wrong(problems)) }
}

/// serde stops at the first problem: each is noted, its key taken out, and the rest read again. With `unknown`, keys that
/// nobody knows are no problems.
fn deserialize<T: DeserializeOwned>(
    mut value: Value,
    environment: &Environment,
    origin: &dyn Fn(&str) -> String,
    mut unknown: Option<&mut Vec<String>>,
) -> Result<T, Error> {
    let mut problems = Vec::new();
    let mut as_text = BTreeSet::new();
    let mut taken_out = BTreeSet::new();
    loop {
        let error = match value.deserialize::<T>() {
            Ok(config) if problems.is_empty() => return Ok(config),
            Ok(_) => return Err(Error::Wrong(problems)),
            Err(error) => error,
        };
        if let (Kind::UnknownField(..), Some(unknown)) = (&error.kind, &mut unknown)
            && set_by(&error.path.join("."), environment).is_none()
            && let Some(found) = value.clone().find(&error.path.join("."))
            && replace(&mut value, &error.path, None)
        {
            leaves(&found, error.path.join("."), unknown);
            continue;
        }
        let problem = problem_of(&error, origin);
        // A variable's text may look like a number and yet be a password.
        if let (Kind::InvalidType(..), Some(text)) = (&error.kind, environment.0.get(&problem.key))
            && as_text.insert(problem.key.clone())
            && replace(&mut value, &error.path, Some(Value::from(text.as_str())))
        {
            continue;
        }
        // A field that was taken out as wrong is no longer there, but not missing.
        if !taken_out.contains(&problem.key) {
            problems.push(problem.clone());
        }
        let mut path = error.path.as_slice();
        while !replace(&mut value, path, None) {
            match path.split_last() {
                Some((_, parent)) => path = parent,
                None => return Err(Error::Wrong(problems)),
            }
        }
        taken_out.insert(path.join("."));
    }
}

/// Puts another value at `path`, or takes out what is there. False where there is nothing.
fn replace(value: &mut Value, path: &[String], with: Option<Value>) -> bool {
    let Some((first, rest)) = path.split_first() else { return false };
    let inner = match value {
        Value::Dict(_, dict) if rest.is_empty() && with.is_none() => return dict.remove(first).is_some(),
        Value::Dict(_, dict) => dict.get_mut(first),
        Value::Array(_, items) if rest.is_empty() && with.is_none() => {
            let index = first.parse().ok().filter(|index| *index < items.len());
            return index.map(|index: usize| items.remove(index)).is_some();
        }
        Value::Array(_, items) => first.parse::<usize>().ok().and_then(|index| items.get_mut(index)),
        _ => None,
    };
    match (inner, with) {
        (Some(inner), Some(with)) if rest.is_empty() => {
            *inner = with;
            true
        }
        (Some(inner), with) => replace(inner, rest, with),
        (None, _) => false,
    }
}

fn problem_of(error: &figment::Error, origin: &dyn Fn(&str) -> String) -> Problem {
    let mut key = error.path.join(".");
    let message = match &error.kind {
        Kind::InvalidType(actual, expected) => format!("expected {expected}, found {}", type_of(actual)),
        Kind::InvalidValue(actual, expected) => {
            format!("expected {expected}, found {} that doesn't fit", type_of(actual))
        }
        Kind::InvalidLength(length, expected) => format!("expected {expected}, found {length} items"),
        Kind::UnknownVariant(_, expected) => format!("expected one of {}", expected.join(", ")),
        Kind::UnknownField(_, []) => "unknown key; none is known here".to_owned(),
        Kind::UnknownField(_, known) => format!("unknown key; known are {}", known.join(", ")),
        Kind::MissingField(field) => {
            if !key.is_empty() {
                key.push('.');
            }
            key.push_str(field);
            "missing".to_owned()
        }
        Kind::ISizeOutOfRange(_) | Kind::USizeOutOfRange(_) => "the number is out of range".to_owned(),
        Kind::Message(message) => message.clone(),
        Kind::DuplicateField(_) => "given twice".to_owned(),
        Kind::Unsupported(actual) | Kind::UnsupportedKey(actual, _) => {
            format!("{} can't stand here", type_of(actual))
        }
    };
    Problem { origin: origin(&key), key, message }
}

/// The type alone: the value may be a secret in the wrong place.
fn type_of(actual: &Actual) -> &'static str {
    match actual {
        Actual::Bool(_) => "a boolean",
        Actual::Unsigned(_) | Actual::Signed(_) | Actual::Float(_) => "a number",
        Actual::Char(_) | Actual::Str(_) | Actual::Bytes(_) => "a string",
        Actual::Unit | Actual::Option => "null",
        Actual::Seq => "a list",
        Actual::Map | Actual::NewtypeStruct => "an object",
        _ => "something else",
    }
}

/// The dotted keys of all that a value holds. Values aren't shown: they may be secrets.
fn leaves(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Dict(_, dict) => {
            dict.iter().for_each(|(name, value)| leaves(value, format!("{at}.{name}"), found));
        }
        _ => found.push(at),
    }
}

/// The environment's key that set this one, or what it is within.
fn set_by<'a>(key: &str, environment: &'a Environment) -> Option<&'a String> {
    environment.0.keys().find(|set| {
        key == set.as_str() || key.strip_prefix(set.as_str()).is_some_and(|rest| rest.starts_with('.'))
    })
}

fn origin_of(key: &str, file: Option<&Path>, environment: &Environment) -> String {
    match (set_by(key, environment), file) {
        (Some(set), _) => format!("{PREFIX}{}", set.replace('.', "__").to_uppercase()),
        (None, Some(path)) => path.display().to_string(),
        (None, None) => String::new(),
    }
}

fn joined(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use secrecy::{ExposeSecret, SecretString};
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Whole {
        listen: Option<SocketAddr>,
        slots: u16,
        password: Option<SecretString>,
        hosts: Vec<String>,
        part: Part,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Part {
        name: String,
        count: u32,
    }

    impl Default for Part {
        fn default() -> Self {
            Self { name: "unnamed".into(), count: 1 }
        }
    }

    fn load_text(json: &str, variables: &[(&str, &str)]) -> Result<Whole, Vec<String>> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), json).expect("written");
        let path = file.path().display().to_string();
        load(Some(file.path()), &Environment::of_pairs(variables.iter().copied()), |_| Vec::new()).map_err(
            |error| match error {
                Error::Wrong(problems) => {
                    problems.iter().map(|problem| problem.to_string().replace(&path, "FILE")).collect()
                }
                other => vec![other.to_string().replace(&path, "FILE")],
            },
        )
    }

    #[test]
    fn the_environment_lies_over_the_file() {
        let config = load_text(
            r#"{"listen": "127.0.0.1:1", "slots": 3, "hosts": ["a"], "part": {"name": "x", "count": 2}}"#,
            &[("slots", "7"), ("part.count", "9"), ("hosts", "[b, c]")],
        )
        .expect("a configuration");
        assert_eq!(config.listen, Some("127.0.0.1:1".parse().expect("an address")));
        assert_eq!((config.slots, config.part.count, config.part.name.as_str()), (7, 9, "x"));
        assert_eq!(config.hosts, ["b", "c"]);
    }

    #[test]
    fn what_is_unknown_in_another_programs_file_is_named_by_its_leaves_and_not_refused() {
        let keys = |json: serde_json::Value| match json {
            Json::Object(keys) => keys,
            other => panic!("{other}"),
        };
        let file = serde_json::json!({
            "slots": 3, "part": {"name": "x", "count": 2, "colour": {"of": "red", "at": []}}, "other": {}, "more": 1
        });
        let load = |environment: &[(&str, &str)]| {
            let environment = Environment::of_pairs(environment.iter().copied());
            load_translated::<Whole>(keys(file.clone()), Path::new("FILE"), &environment, |_| vec![])
        };
        let (config, mut unknown) = load(&[]).expect("right");
        assert_eq!((config.slots, config.part.count, config.part.name.as_str()), (3, 2, "x"));
        unknown.sort();
        assert_eq!(unknown, ["more", "part.colour.at", "part.colour.of"]);
        let error = load(&[("part.shape", "round")]).expect_err("wrong").to_string();
        assert!(error.contains("`part.shape` (KILN_PART__SHAPE): unknown key"), "{error}");
        assert!(!error.contains("colour"), "{error}");
    }

    #[test]
    fn a_password_that_looks_like_a_number_is_a_text() {
        for text in ["12345678", "1e5", "true", "[x]"] {
            let config = load_text("{}", &[("password", text)]).expect("a configuration");
            assert_eq!(config.password.expect("a password").expose_secret(), text);
        }
    }

    #[test]
    fn every_problem_is_named_by_its_key_and_none_shows_a_value() {
        let problems = load_text(
            r#"{"listen": "nowhere", "slots": "many", "password": 99887766, "hosts": ["a", 5], "colour": 1,
                "part": {"name": "x", "cuont": 2}}"#,
            &[("slots", "hunter2"), ("part.count", "-1")],
        )
        .expect_err("wrong");
        assert_eq!(
            problems,
            [
                "`colour` (FILE): unknown key; known are listen, slots, password, hosts, part",
                "`hosts.1` (FILE): expected a string, found a number",
                "`listen` (FILE): invalid socket address syntax",
                "`part.count` (KILN_PART__COUNT): expected u32, found a number that doesn't fit",
                "`part.cuont` (FILE): unknown key; known are name, count",
                "`password` (FILE): expected a string, found a number",
                "`slots` (KILN_SLOTS): expected u16, found a string",
            ]
        );
    }

    #[test]
    fn a_missing_field_is_named() {
        let problems = load_text(r#"{"part": {"name": "x"}, "slots": []}"#, &[]).expect_err("wrong");
        assert_eq!(problems, ["`part.count` (FILE): missing", "`slots` (FILE): expected u16, found a list"]);
    }

    #[test]
    fn a_file_that_is_no_configuration_is_named() {
        let not_json = load_text(r#"{"slots": "#, &[]).expect_err("wrong");
        assert_eq!(not_json, ["the configuration file FILE is not JSON"]);
        assert_eq!(
            load_text("[1]", &[]).expect_err("wrong"),
            ["the configuration file FILE holds no JSON object"]
        );
        let absent = load::<Whole>(Some(Path::new("/nowhere/x.json")), &Environment::default(), |_| vec![]);
        assert_eq!(
            absent.expect_err("absent").to_string(),
            "the configuration file /nowhere/x.json can't be read"
        );
    }

    #[test]
    fn what_a_later_check_finds_names_its_variable() {
        let environment = Environment::of_pairs([("slots", "0")]);
        let error = load::<Whole>(None, &environment, |config| {
            (config.slots == 0).then(|| Problem::new("slots", "must be at least 1")).into_iter().collect()
        });
        assert_eq!(
            error.expect_err("wrong").to_string(),
            "the configuration is wrong: `slots` (KILN_SLOTS): must be at least 1"
        );
    }
}
