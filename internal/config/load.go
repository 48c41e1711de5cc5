package config

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"go.yaml.in/yaml/v3"
)

// Flags adds --config and a flag for each field to fset. The returned function, to be
// called after fset.Parse, loads the configuration. Its error is an [Error] unless the
// file cannot be read.
func (s *Schema[C]) Flags(fset *flag.FlagSet, getenv func(string) string) func() (*C, error) {
	load := s.flags(fset, getenv)
	return func() (*C, error) {
		l, err := load()
		if err != nil {
			return nil, err
		}
		return l.c, nil
	}
}

// CheckFlags is [Schema.Flags] for a command that only checks the configuration. The
// returned function also returns what this machine lacks for it.
func (s *Schema[C]) CheckFlags(fset *flag.FlagSet, getenv func(string) string) func(context.Context) ([]Problem, error) {
	load := s.flags(fset, getenv)
	return func(ctx context.Context) ([]Problem, error) {
		l, err := load()
		if err != nil || s.Probe == nil {
			return nil, err
		}
		return l.collect(func(c *Checker[C]) { s.Probe(ctx, getenv, c) }), nil
	}
}

func (s *Schema[C]) flags(fset *flag.FlagSet, getenv func(string) string) func() (*loader[C], error) {
	file := fset.String("config", "", "")
	flags := map[string]string{}
	for i := range s.Fields {
		f := &s.Fields[i]
		if f.Flag() == "" {
			continue
		}
		set := func(v string) error { flags[f.Path] = v; return nil }
		if f.Kind() == kindBool {
			fset.BoolFunc(f.Flag(), f.Doc, set)
		} else {
			fset.Func(f.Flag(), f.Doc, set)
		}
	}
	return func() (*loader[C], error) {
		var data []byte
		if *file != "" {
			var err error
			if data, err = ReadFile(*file, maxFileSize); err != nil {
				return nil, fmt.Errorf("read configuration: %w", err)
			}
		}
		return s.load(*file, data, flags, getenv)
	}
}

// Load loads a configuration from the content of file, the environment, and flags by the
// path of their field. The error is an [Error].
func (s *Schema[C]) Load(file string, data []byte, flags map[string]string, getenv func(string) string) (*C, error) {
	l, err := s.load(file, data, flags, getenv)
	if err != nil {
		return nil, err
	}
	return l.c, nil
}

func (s *Schema[C]) load(file string, data []byte, flags map[string]string, getenv func(string) string) (*loader[C], error) {
	l := &loader[C]{schema: s, c: s.Defaults(), reader: &reader{file: file}, origins: map[string]string{}}
	if root := l.document(data); root != nil {
		l.section("", root, 0, 1)
	}
	for i := range s.Fields {
		f := &s.Fields[i]
		if name := s.Variable(f); name != "" {
			if v := getenv(name); v != "" {
				l.store(f, "", v, name)
			}
		}
		if v, ok := flags[f.Path]; ok {
			l.store(f, "", v, "flag --"+f.Flag())
		}
	}
	// Check the values only if all of them are known.
	if len(l.out) == 0 {
		l.out = l.check()
	}
	if len(l.out) > 0 {
		return nil, Error(l.out)
	}
	return l, nil
}

// reader parses a YAML file and collects problems.
type reader struct {
	file string
	out  []Problem
}

// loader collects the values of one C, and where each was set, by path.
type loader[C any] struct {
	*reader
	schema  *Schema[C]
	c       *C
	origins map[string]string
	named   map[string]bool // sections with a name whose defaults are set
}

// check runs the schema's own checks.
func (l *loader[C]) check() []Problem {
	if l.schema.Check == nil {
		return nil
	}
	return l.collect(l.schema.Check)
}

// collect returns the problems that check finds, in the order of the fields.
func (l *loader[C]) collect(check func(*Checker[C])) []Problem {
	c := &Checker[C]{Config: l.c, schema: l.schema, file: l.file, origins: l.origins}
	check(c)
	return c.sorted()
}

// store parses a value and records where it came from.
func (l *loader[C]) store(f *Field[C], name, text, where string) {
	path := f.Path
	if name != "" {
		path = concrete(f.Path, name)
		l.name(f, name)
	}
	if err := f.parse(l.c, name, text); err != nil {
		l.out = append(l.out, Problem{Where: where, Path: path, Value: shown(f, text), What: err.Error()})
		return
	}
	l.origins[path] = where
	if list, ok := f.pointer(l.c, name).(*[]string); ok {
		for i := range *list {
			l.origins[fmt.Sprintf("%s[%d]", path, i)] = where
		}
	}
}

// name sets the defaults of a section with a name when its first value is stored.
func (l *loader[C]) name(f *Field[C], name string) {
	section := beforeName(f.Path) + "." + name
	if l.named[section] {
		return
	}
	if l.named == nil {
		l.named = map[string]bool{}
	}
	l.named[section] = true
	l.schema.nameDefaults(l.c, f.Path, name)
}

// concrete replaces the placeholder of a path with a name.
func concrete(pattern, name string) string {
	parts := strings.Split(pattern, ".")
	for i := range parts {
		if isChosen(parts[i]) {
			parts[i] = name
		}
	}
	return strings.Join(parts, ".")
}

func shown[C any](f *Field[C], text string) string {
	if f.Secret {
		return ""
	}
	return strconv.Quote(text)
}

// document parses a file of one YAML document and returns its root; nil if it is empty.
func (r *reader) document(data []byte) *yaml.Node {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, more yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil // empty, or comments only
	case err != nil:
		r.out = append(r.out, syntax(r.file, err))
		return nil
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		r.at(more.Line, "", "the file has more than one document", "remove everything from the second --- on")
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil
	}
	return root
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// syntax converts an error of the YAML parser to one with file:line.
func syntax(file string, err error) Problem {
	where, text := file+":1", err.Error() // the parser omits the number of the first line
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		if m[1] != "" {
			where = file + ":" + m[1]
		}
		text = text[len(m[0]):]
	}
	if strings.Contains(text, "anchor") { // it has no line, and the name may be a secret that begins with *
		where, text = file, "an alias has no anchor"
	}
	return Problem{Where: where, What: "is not YAML: " + text, Remedy: "check the indentation and the quotes around it"}
}

// place formats a line of the file.
func (r *reader) place(line int) string {
	if line > 0 {
		return fmt.Sprintf("%s:%d", r.file, line)
	}
	return r.file
}

// at reports a problem in a line of the file; path may be empty.
func (r *reader) at(line int, path, what, remedy string) {
	r.out = append(r.out, Problem{Where: r.place(line), Path: path, What: what, Remedy: remedy})
}

// pairs calls each with the keys and values of a mapping below prefix.
func (r *reader) pairs(prefix string, n *yaml.Node, line int, each func(path string, key, value *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		r.at(max(n.Line, line), strings.TrimSuffix(prefix, "."), "is not a list of fields", "write one \"name: value\" a line")
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		path := prefix + key.Value
		if first, dup := seen[path]; dup {
			r.at(key.Line, path, fmt.Sprintf("is given twice, first in line %d", first), "keep one of the two")
			continue
		}
		seen[path] = key.Line
		each(path, key, value)
	}
}

// section loads a mapping below prefix, at this depth.
func (l *loader[C]) section(prefix string, n *yaml.Node, line, depth int) {
	l.pairs(prefix, n, line, func(path string, key, value *yaml.Node) {
		f, name := l.schema.field(path)
		section, chosen := l.schema.section(path, depth)
		switch {
		case key.Kind == yaml.ScalarNode && f != nil:
			l.value(f, name, path, key, value)
		case key.Kind == yaml.ScalarNode && section:
			l.section(path+".", value, key.Line, depth+1)
			if chosen && value.Kind == yaml.MappingNode && len(value.Content) == 0 {
				l.at(key.Line, path, "has no fields", "give one or remove it")
			}
		default:
			l.at(key.Line, strconv.Quote(path), "is not a field", l.schema.suggest(path, strings.TrimSuffix(prefix, "."), depth))
		}
	})
}

// value stores a value of the file if it has the YAML type of the field. So 60 is not
// accepted as a duration: it is more likely a mistake than 60 ns.
func (l *loader[C]) value(f *Field[C], name, path string, key, v *yaml.Node) {
	if v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	bad := func(what, remedy string) {
		value := ""
		if v.Kind == yaml.ScalarNode {
			value = shown(f, v.Value)
		}
		l.out = append(l.out, Problem{Where: l.place(key.Line), Path: path, Value: value, What: what, Remedy: remedy})
	}
	kind, last := f.Kind(), path[strings.LastIndex(path, ".")+1:]
	switch {
	case v.Kind == yaml.ScalarNode && v.ShortTag() == "!!null":
		l.at(key.Line, path, "has no value", "give one or remove the line")
	case kind == kindList && v.Kind == yaml.SequenceNode:
		l.list(f, name, path, key, v)
	case kind == kindList:
		bad("is not a list", "write "+last+": [A, B], or one \"- value\" a line")
	case v.Kind != yaml.ScalarNode:
		bad("takes one value, not a list or a section", "write "+last+": "+f.example())
	default:
		if what, remedy := wrongTag(kind, v.ShortTag()); what != "" {
			bad(what, remedy)
			return
		}
		l.store(f, name, v.Value, l.place(key.Line))
	}
}

// list stores the items of a list, each with its line. An empty list is not nil.
func (l *loader[C]) list(f *Field[C], name, path string, key, v *yaml.Node) {
	if name != "" {
		l.name(f, name)
	}
	items := make([]string, 0, len(v.Content))
	for i, n := range v.Content {
		if n.Kind == yaml.AliasNode {
			n = n.Alias
		}
		item := fmt.Sprintf("%s[%d]", path, i)
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" || n.Value == "" {
			l.at(n.Line, item, "is not a string", "put quotes around it")
			continue
		}
		l.origins[item] = l.place(n.Line)
		items = append(items, n.Value)
	}
	*f.pointer(l.c, name).(*[]string) = items
	l.origins[path] = l.place(key.Line)
}

// wrongTag returns the problem of a value whose YAML type is not that of the field.
func wrongTag(kind, tag string) (what, remedy string) {
	switch kind {
	case kindMode: // in YAML 0770 is an integer and "0770" a string
	case kindBool:
		if tag != "!!bool" {
			return "is not a boolean", "write true, or false, without quotes"
		}
	case kindNumber:
		if tag != "!!int" {
			return "is not an integer", "write the digits without quotes and without a unit"
		}
	case kindDuration:
		if tag != "!!str" {
			return "has no unit", "write it with a unit, such as 500ms, 60s or 5m"
		}
	default:
		if tag != "!!str" {
			return "is not a string", "put quotes around it"
		}
	}
	return "", ""
}

// example returns an example value.
func (f *Field[C]) example() string {
	if f.Default != "" {
		return f.Default
	}
	return "VALUE"
}

// maxFileSize bounds a configuration file, so that a wrong path, such as a device, does
// not fill the memory.
const maxFileSize = 1 << 20

// ReadFile reads a file of limit bytes at most. Its errors have the path, and passed
// [FileError].
func ReadFile(path string, limit int64) ([]byte, error) {
	data, err := readFile(path, limit)
	return data, FileError(err)
}

func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	switch {
	case errors.Is(err, syscall.EISDIR):
		return nil, fmt.Errorf("%s is a directory: give a file", path)
	case err != nil:
		return nil, err
	case int64(len(data)) > limit:
		return nil, fmt.Errorf("%s is larger than %d bytes: give another file", path, limit)
	}
	return data, nil
}
