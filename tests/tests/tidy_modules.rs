//! Boundaries that the compiler does not check: no circle of modules inside a crate, and no reference to a file that does
//! not exist.
//!
//! **What counts as a circle.** A module is a file; a module within a file belongs to the file. Module A uses module B if
//! A, outside of its tests, names B by a path: `crate::…`, `self::…`, `super::…`, or a child's name. A name that a parent
//! re-exports (`pub use`) counts as the child's. A child may use its parent and the modules above, because it is part of
//! them and works on their types. All other uses must not form a circle, neither directly nor through further modules, so
//! that each module can be read, tested and moved together with its children.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

/// A module by its path in the crate; the root is empty.
type Module = Vec<String>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All files below `folder`, except built, downloaded and hidden ones.
fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let skipped = ["target", "node_modules", "__pycache__", "corpus"];
            if name.starts_with('.') || skipped.contains(&&*name) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The source folders of the workspace's crates.
fn crates() -> anyhow::Result<Vec<PathBuf>> {
    let manifest: toml::Value = toml::from_str(&fs::read_to_string(root().join("Cargo.toml"))?)?;
    let members = manifest["workspace"]["members"].as_array();
    let members = members.context("the members of the workspace")?;
    let folder = |member: &toml::Value| Some(root().join(member.as_str()?).join("src"));
    Ok(members.iter().filter_map(folder).collect())
}

/// The text without comments, strings and the module of tests at the end of a file.
fn code(text: &str) -> String {
    let mut code = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("#[cfg(test)]") && !line.starts_with(' ') {
            // Either `mod tests;` with its own file, or the rest of this file.
            let (_, rest) = text.split_once(line).unwrap_or_default();
            let next = rest.lines().find(|line| line.contains("mod "));
            if next.is_some_and(|next| next.trim_end().ends_with('{')) {
                break;
            }
        }
        let line = line.split_once("//").map_or(line, |(before, _)| before);
        for (index, part) in line.split('"').enumerate() {
            if index % 2 == 0 {
                code.push_str(part);
            }
        }
        code.push('\n');
    }
    code
}

/// The modules of a crate with their code, without tests and harnesses of fuzz targets.
fn modules(source: &Path) -> anyhow::Result<BTreeMap<Module, String>> {
    let mut found = BTreeMap::new();
    // The root of a crate that has no library.
    let main = !source.join("lib.rs").is_file();
    for file in files(source)? {
        let relative = file.strip_prefix(source)?.with_extension("");
        let parts: Module = relative
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let is_rust = file.extension().is_some_and(|extension| extension == "rs");
        let outside = ["bin", "tests", "fuzzed"];
        if !is_rust
            || (parts == ["main"] && !main)
            || parts.iter().any(|part| outside.contains(&part.as_str()))
        {
            continue;
        }
        let is_root = parts == ["lib"] || parts == ["main"];
        let module = if is_root { Vec::new() } else { parts };
        found.insert(module, code(&fs::read_to_string(&file)?));
    }
    Ok(found)
}

/// The paths of a use tree, `a::{self, b::c}`: `a`, `a::b::c`.
fn paths(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, rest)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap_or(tree).trim().to_owned()];
    };
    let body = rest.rsplit_once('}').map_or(rest, |(body, _)| body);
    let mut depth = 0_i32;
    let parts = body.split(|symbol| {
        depth += i32::from(symbol == '{') - i32::from(symbol == '}');
        symbol == ',' && depth == 0
    });
    parts
        .filter(|part| !part.trim().is_empty())
        .flat_map(paths)
        .map(|path| match path.as_str() {
            "self" => prefix.trim().trim_end_matches("::").to_owned(),
            path => format!("{}{path}", prefix.trim()),
        })
        .collect()
}

/// The use trees of a module, with whether they are public.
fn uses(code: &str) -> Vec<(bool, String)> {
    let mut found = Vec::new();
    for (start, _) in code.match_indices("use ") {
        let line = code[..start].rsplit('\n').next().unwrap_or_default().trim();
        if line.is_empty() || line.starts_with("pub") {
            let tree = code[start + 4..].split(';').next().unwrap_or_default();
            found.push((!line.is_empty(), tree.replace('\n', " ")));
        }
    }
    found
}

/// Paths in the code itself that begin at the crate, here, or above.
fn inline(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for head in ["crate::", "self::", "super::"] {
        for (start, _) in code.match_indices(head) {
            if !code[..start].ends_with([':', '_']) {
                let more = |symbol: char| symbol.is_alphanumeric() || matches!(symbol, '_' | ':');
                let rest = &code[start..];
                let end = rest.find(|symbol| !more(symbol)).unwrap_or(rest.len());
                found.push(rest[..end].trim_end_matches(':').to_owned());
            }
        }
    }
    found
}

/// The modules of one crate, and which module uses which.
struct Crate {
    modules: BTreeMap<Module, String>,
    /// The re-exports: from a module and a name to the child that defines the name.
    shown: BTreeMap<(Module, String), Module>,
}

impl Crate {
    fn read(source: &Path) -> anyhow::Result<Self> {
        let modules = modules(source)?;
        let mut shown = BTreeMap::new();
        for (module, code) in &modules {
            let public = uses(code).into_iter().filter(|(public, _)| *public);
            for path in public.flat_map(|(_, tree)| paths(&tree)) {
                let mut parts = split(&path);
                if parts.first().is_some_and(|first| first == "self") {
                    parts.remove(0);
                }
                let Some(name) = parts.pop() else { continue };
                let below = (1..=parts.len())
                    .rev()
                    .map(|depth| [&module[..], &parts[..depth]].concat());
                if let Some(child) = below.into_iter().find(|child| modules.contains_key(child)) {
                    shown.insert((module.clone(), name), child);
                }
            }
        }
        Ok(Self { modules, shown })
    }

    /// The module that `path` leads to, seen from `from`; `None` if it leads out of the crate.
    fn leads_to(&self, from: &Module, path: &str) -> Option<Module> {
        let parts = split(path);
        let (mut at, mut rest) = match parts.first()?.as_str() {
            "crate" => (Vec::new(), &parts[1..]),
            "self" => (from.clone(), &parts[1..]),
            "super" => (from.clone(), &parts[..]),
            first => {
                let child = [from.clone(), vec![first.to_owned()]].concat();
                self.modules.contains_key(&child).then_some(())?;
                (from.clone(), &parts[..])
            }
        };
        while rest.first().is_some_and(|part| part == "super") {
            at.pop();
            rest = &rest[1..];
        }
        for part in rest {
            let child = [at.clone(), vec![part.clone()]].concat();
            if self.modules.contains_key(&child) {
                at = child;
            } else if let Some(child) = self.shown.get(&(at.clone(), part.clone())) {
                return Some(child.clone());
            } else {
                break;
            }
        }
        Some(at)
    }

    /// Which modules each module uses, without the modules above it.
    fn users(&self) -> BTreeMap<&Module, BTreeSet<Module>> {
        let mut users = BTreeMap::new();
        for (module, code) in &self.modules {
            let trees = uses(code);
            let named = trees.iter().flat_map(|(_, tree)| paths(tree));
            let used = named
                .chain(inline(code))
                .filter_map(|path| self.leads_to(module, &path))
                .filter(|used| !module.starts_with(used))
                .collect();
            users.insert(module, used);
        }
        users
    }
}

fn split(path: &str) -> Module {
    path.split("::")
        .map(|part| part.trim().to_owned())
        .collect()
}

/// All modules that `from` reaches.
fn reach(users: &BTreeMap<&Module, BTreeSet<Module>>, from: &Module) -> BTreeSet<Module> {
    let mut found = BTreeSet::new();
    let mut queue = vec![from.clone()];
    while let Some(module) = queue.pop() {
        for used in users.get(&module).into_iter().flatten() {
            if found.insert(used.clone()) {
                queue.push(used.clone());
            }
        }
    }
    found
}

/// The edges that lie on a circle, as `a → b`.
fn circles(source: &Path) -> anyhow::Result<Vec<String>> {
    let all = Crate::read(source)?;
    ensure!(
        !all.modules.is_empty(),
        "no modules in {}",
        source.display()
    );
    let users = all.users();
    let mut found = Vec::new();
    for (module, used) in &users {
        for other in used {
            if reach(&users, other).contains(*module) {
                let name = |module: &Module| module.join("/");
                found.push(format!("{} → {}", name(module), name(other)));
            }
        }
    }
    Ok(found)
}

#[test]
fn no_modules_use_each_other_in_a_circle() -> anyhow::Result<()> {
    let mut found = Vec::new();
    for source in crates()? {
        let name = source.strip_prefix(root())?.display().to_string();
        found.extend(
            circles(&source)?
                .into_iter()
                .map(|edge| format!("{name}: {edge}")),
        );
    }
    ensure!(found.is_empty(), "on a circle: {found:#?}");
    Ok(())
}

/// The check itself works: it finds a circle however a module is named, and accepts uses of parents.
#[test]
#[expect(clippy::disallowed_methods, reason = "files of a test's own folder")]
fn a_circle_is_found_however_its_modules_are_named() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, text: &str| -> anyhow::Result<()> {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        Ok(fs::write(path, text)?)
    };
    write(
        "lib.rs",
        "mod a; mod b; mod c;\npub use self::c::d::Deep;\n",
    )?;
    write("a.rs", "use crate::{\n    b::{self, B},\n};\n")?;
    write(
        "b.rs",
        "/// Not [`crate::a`].\nfn b() -> &str { \"crate::a\" }\n",
    )?;
    write("c.rs", "mod d;\nuse d::Deep;\n")?;
    write("c/d.rs", "use super::C;\n")?;
    ensure!(
        circles(folder.path())?.is_empty(),
        "{:?}",
        circles(folder.path())?
    );
    write(
        "b.rs",
        "#[cfg(test)]\nmod tests {\n    use crate::a::A;\n}\n",
    )?;
    ensure!(circles(folder.path())?.is_empty(), "tests do not count");
    write("b.rs", "fn b() { crate::a::call() }\n")?;
    ensure!(circles(folder.path())? == ["a → b", "b → a"]);
    // Through the root's re-export of a grandchild, and through a child that its parent calls.
    write("b.rs", "use crate::Deep;\n")?;
    write("c/d.rs", "use crate::a::A;\n")?;
    let found = circles(folder.path())?;
    ensure!(found == ["a → b", "b → c/d", "c/d → a"], "{found:?}");
    write("b.rs", "use crate::c::C;\n")?;
    let found = circles(folder.path())?;
    ensure!(
        found == ["a → b", "b → c", "c → c/d", "c/d → a"],
        "{found:?}"
    );
    Ok(())
}

/// The files of the repository, as references name them.
fn known_files() -> anyhow::Result<Vec<String>> {
    let names = files(&root())?.into_iter();
    names
        .map(|file| Ok(format!("/{}", file.strip_prefix(root())?.display())))
        .collect()
}

/// The parts of a line that look like the name of one of our sources or documents: in backquotes, in a code block of a
/// document, or the target of a link.
fn references(line: &str) -> Vec<String> {
    let name = |symbol: char| symbol.is_ascii_alphanumeric() || "_-./".contains(symbol);
    let words = line.split(|symbol| !name(symbol));
    words
        .map(|word| word.trim_end_matches('.').trim_start_matches("./"))
        .filter(|word| {
            let kind = word.rsplit_once('.').map_or("", |(stem, kind)| {
                if stem.is_empty() || stem.ends_with('/') {
                    ""
                } else {
                    kind
                }
            });
            matches!(kind, "rs" | "proto" | "sh" | "md") && !word.starts_with('/')
        })
        .map(ToOwned::to_owned)
        .collect()
}

/// The decisions that a line names, such as `ADR 0007`, but not `0021 by 0024` in the index.
fn decisions(line: &str) -> impl Iterator<Item = &str> {
    line.split("ADR ")
        .skip(1)
        .filter_map(|rest| rest.get(..4))
        .filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The line if it is prose: a comment of a source or script, or any line of a document.
fn prose<'a>(kind: &str, line: &'a str) -> Option<&'a str> {
    let line = line.trim_start();
    match kind {
        "md" => Some(line),
        "rs" | "proto" => line.starts_with("//").then_some(line),
        "sh" | "toml" | "yaml" => line.starts_with('#').then_some(line),
        _ => None,
    }
}

#[test]
fn nothing_names_a_file_that_does_not_exist() -> anyhow::Result<()> {
    let known = known_files()?;
    let mut missing = Vec::new();
    for file in files(&root())? {
        let kind = file
            .extension()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let name = file.strip_prefix(root())?.display().to_string();
        // The change log names former files, and these documents name files of other projects.
        if name == "CHANGELOG.md" || name.starts_with("tests/interop") {
            continue;
        }
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            let Some(line) = prose(&kind, line) else {
                continue;
            };
            let lost_files = references(line).into_iter().filter(|reference| {
                let tail = format!("/{}", reference.trim_start_matches("../"));
                !known.iter().any(|known| known.ends_with(&tail))
            });
            let lost_decisions = decisions(line)
                .map(|number| format!("docs/adr/{number}-"))
                .filter(|head| !known.iter().any(|known| known.contains(head.as_str())));
            for lost in lost_files.chain(lost_decisions) {
                missing.push(format!("{name}:{}: {lost}", number + 1));
            }
        }
    }
    ensure!(missing.is_empty(), "named, and not there: {missing:#?}");
    Ok(())
}
