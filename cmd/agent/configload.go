package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// maxConfigSize keeps a wrong path, a device say, from filling the memory.
const maxConfigSize = 1 << 20

// problem is one thing wrong with the configuration.
type problem struct {
	where  string // file:line, file, flag or variable; may be empty
	path   string // the field; empty when it is about the file as a whole
	value  string // as given, quoted; empty for secrets and where there is none
	what   string // "is not a duration"
	remedy string // what to do
}

func (p problem) String() string {
	var b strings.Builder
	if p.where != "" {
		b.WriteString(p.where + ": ")
	}
	if p.path != "" {
		b.WriteString(p.path)
		if p.value != "" {
			b.WriteString(": " + p.value)
		}
		b.WriteString(" ")
	}
	b.WriteString(p.what)
	if p.remedy != "" {
		b.WriteString("; " + p.remedy)
	}
	return b.String()
}

// configError is everything wrong with a configuration, not only the first.
type configError []problem

func (e configError) Error() string {
	lines := make([]string, len(e))
	for i, p := range e {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// configFlags adds -config and one flag for each field to fset. The returned
// function, called after fset.Parse, loads the configuration: a flag wins over
// the environment, the environment over the file, the file over the default.
// An error is a [configError] unless the file cannot be read.
func configFlags(fset *flag.FlagSet, getenv func(string) string) func() (*config, error) {
	file := fset.String("config", "", "")
	flags := map[string]string{}
	for i := range fields {
		f := &fields[i]
		if f.flag() == "" {
			continue
		}
		set := func(v string) error { flags[f.path] = v; return nil }
		if f.kind() == "true or false" {
			fset.BoolFunc(f.flag(), f.doc, set)
		} else {
			fset.Func(f.flag(), f.doc, set)
		}
	}
	return func() (*config, error) {
		var data []byte
		if *file != "" {
			var err error
			if data, err = readLimited(*file); err != nil {
				return nil, fmt.Errorf("read configuration: %w", err)
			}
		}
		return load(*file, data, flags, getenv)
	}
}

// load puts the configuration together from the file's content, flags by
// field path, and the environment.
func load(file string, data []byte, flags map[string]string, getenv func(string) string) (*config, error) {
	l := gather(file, data, flags, getenv)
	// What a value contradicts is worth saying only when the values are known.
	if len(l.out) == 0 {
		l.out = validate(l.cfg, l.origins, file)
	}
	if len(l.out) > 0 {
		return nil, configError(l.out)
	}
	return l.cfg, nil
}

// gather reads all sources, the strongest last.
func gather(file string, data []byte, flags map[string]string, getenv func(string) string) *loader {
	l := &loader{cfg: defaults(), file: file, origins: map[string]string{}}
	l.document(data)
	for i := range fields {
		f := &fields[i]
		if v := getenv(f.env()); v != "" {
			l.store(f, v, f.env())
		}
		if v, ok := flags[f.path]; ok {
			l.store(f, v, "flag -"+f.flag())
		}
	}
	return l
}

// loader collects the values, where each was set (by path), and the problems.
type loader struct {
	cfg     *config
	file    string
	origins map[string]string
	out     []problem
}

// store parses one value and remembers where it came from.
func (l *loader) store(f *field, text, where string) {
	if err := f.parse(l.cfg, text); err != nil {
		l.out = append(l.out, problem{where: where, path: f.path, value: shown(f, text), what: err.Error()})
		return
	}
	l.origins[f.path] = where
}

func shown(f *field, text string) string {
	if f.secret {
		return ""
	}
	return strconv.Quote(text)
}

// document reads the YAML file.
func (l *loader) document(data []byte) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return // empty, or comments only
	case err != nil:
		l.out = append(l.out, syntax(l.file, err))
		return
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		l.at(more.Line, "", "the file holds more than one document", "remove everything from the second --- on")
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return
	}
	l.section("", root, 0)
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// syntax turns the parser's error into one with file:line.
func syntax(file string, err error) problem {
	where, text := file+":1", err.Error() // the parser leaves out the first line
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		if m[1] != "" {
			where = file + ":" + m[1]
		}
		text = text[len(m[0]):]
	}
	if strings.Contains(text, "anchor") { // no line, and its name may be a secret that begins with *
		where, text = file, "an alias has no anchor"
	}
	return problem{where: where, what: "is not YAML: " + text, remedy: "check the indentation and the quotes around it"}
}

// section reads one mapping whose keys are below prefix.
func (l *loader) section(prefix string, n *yaml.Node, line int) {
	if n.Kind != yaml.MappingNode {
		l.at(max(n.Line, line), strings.TrimSuffix(prefix, "."), "is not a list of fields", "write one \"name: value\" a line")
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		path := prefix + key.Value
		if first, dup := seen[path]; dup {
			l.at(key.Line, path, fmt.Sprintf("is given twice, first in line %d", first), "keep one of the two")
			continue
		}
		seen[path] = key.Line
		switch f := fieldByPath(path); {
		case key.Kind == yaml.ScalarNode && f != nil:
			l.scalar(f, key, value)
		case key.Kind == yaml.ScalarNode && isSection(path):
			l.section(path+".", value, key.Line)
		default:
			l.at(key.Line, strconv.Quote(path), "is not a field", suggest(path))
		}
	}
}

// scalar stores one value of the file, when it has the YAML type that the
// field asks for: a bare 60 for a duration is more likely a mistake than 60 ns.
func (l *loader) scalar(f *field, key, v *yaml.Node) {
	where := fmt.Sprintf("%s:%d", l.file, key.Line)
	bad := func(what, remedy string) {
		value := ""
		if v.Kind == yaml.ScalarNode {
			value = shown(f, v.Value)
		}
		l.out = append(l.out, problem{where: where, path: f.path, value: value, what: what, remedy: remedy})
	}
	if v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	if v.Kind != yaml.ScalarNode {
		bad("takes one value, not a list or a section", "write "+f.path[strings.LastIndex(f.path, ".")+1:]+": "+f.example())
		return
	}
	tag := v.ShortTag()
	if tag == "!!null" {
		l.out = append(l.out, problem{where: where, path: f.path, what: "has no value", remedy: "give one or remove the line"})
		return
	}
	switch kind := f.kind(); kind {
	case "octal mode": // 0770 is a number to YAML and "0770" is text
	case "true or false":
		if tag != "!!bool" {
			bad("is neither true nor false", "write true or false without quotes")
			return
		}
	case "whole number":
		if tag != "!!int" {
			bad("is not a whole number", "write the digits without quotes and without a unit")
			return
		}
	case "duration":
		if tag != "!!str" {
			bad("has no unit", "write it with a unit, such as 500ms, 60s or 5m")
			return
		}
	default:
		if tag != "!!str" {
			bad("is not text", "put quotes around it")
			return
		}
	}
	l.store(f, v.Value, where)
}

// at reports a problem in a line of the file; field may be empty.
func (l *loader) at(line int, path, what, remedy string) {
	where := l.file
	if line > 0 {
		where = fmt.Sprintf("%s:%d", l.file, line)
	}
	l.out = append(l.out, problem{where: where, path: path, what: what, remedy: remedy})
}

// example is a value of the right form.
func (f *field) example() string {
	if f.def != "" {
		return f.def
	}
	return "VALUE"
}

func isSection(path string) bool {
	for i := range fields {
		if strings.HasPrefix(fields[i].path, path+".") {
			return true
		}
	}
	return false
}

// suggest names the field that was probably meant: the same last part in
// another section, or the fewest letters away.
func suggest(path string) string {
	last := path[strings.LastIndex(path, ".")+1:]
	best, least := "", 4
	for i := range fields {
		name := fields[i].path
		if name[strings.LastIndex(name, ".")+1:] == last {
			return "did you mean " + name + "?"
		}
		if d := distance(path, name); d < least {
			best, least = name, d
		}
	}
	if best != "" {
		return "did you mean " + best + "?"
	}
	return "remove it; \"agent help config\" lists the fields"
}

// distance is the number of letters to insert, remove or change (Levenshtein).
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// readLimited reads a file of at most [maxConfigSize] bytes.
func readLimited(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfigSize {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxConfigSize)
	}
	return data, nil
}

// notInMemory says why dir is not on a memory file system, or "". Of a
// directory that does not exist yet, the nearest one above that does counts.
func notInMemory(dir string) string {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		switch {
		case errors.Is(err, unix.ENOENT) && filepath.Dir(dir) != dir:
			dir = filepath.Dir(dir)
			continue
		case err != nil:
			return "cannot be looked at: " + err.Error()
		case st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC:
			return ""
		}
		return "is not on a memory file system"
	}
}
