package config

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Problem is an error in a configuration.
type Problem struct {
	Where  string // file:line, file, flag or variable; may be empty
	Path   string // the field; empty for the file as a whole
	Value  string // quoted; empty for secrets and missing values
	What   string // the cause, such as "is not a duration"
	Remedy string // in one imperative sentence
}

// String returns the problem in one line.
func (p Problem) String() string {
	var b strings.Builder
	if p.Where != "" {
		b.WriteString(p.Where + ": ")
	}
	if p.Path != "" {
		b.WriteString(p.Path)
		if p.Value != "" {
			b.WriteString(": " + p.Value)
		}
		b.WriteString(" ")
	}
	b.WriteString(p.What)
	if p.Remedy != "" {
		b.WriteString("; " + p.Remedy)
	}
	return newlines.ReplaceAllString(b.String(), " ")
}

// newlines are in the errors of some libraries.
var newlines = regexp.MustCompile(`\s*\n\s*`)

// Error is all errors in a configuration.
type Error []Problem

// Permanent is true: a restart with the same configuration fails again.
func (e Error) Permanent() bool { return true }

// Error returns one line for each problem; see [Lines].
func (e Error) Error() string { return strings.Join(Lines(e), "\n") }

// maxLines is how many problems a person reads at once.
const maxLines = 20

// Lines returns one line for each of the first 20 problems, and one with the number of the
// others.
func Lines(problems []Problem) []string {
	shown := problems[:min(len(problems), maxLines)]
	lines := make([]string, 0, len(shown)+1)
	for _, p := range shown {
		lines = append(lines, p.String())
	}
	if more := len(problems) - len(shown); more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more like these", more))
	}
	return lines
}

// Checker collects the problems of Config, each with the place of its value. A path may
// also be that of an item of a list, operators.managers[0], or of a value of a map,
// deployments.default.address.
type Checker[C any] struct {
	Config *C

	schema   *Schema[C]
	file     string
	origins  map[string]string
	unknown  func(path string) bool // fields whose value is not known, because it has a problem
	out      []Problem
	warnings []Problem
}

// Bad reports an invalid value of the field at path. A problem that is of a field whose
// value could not be read, or names one, is left out: that one has to be corrected first.
func (c *Checker[C]) Bad(path, what, remedy string) {
	if p := c.problem(path, what, remedy); c.known(p) {
		c.out = append(c.out, p)
	}
}

// Warn reports what may be right on another machine, or a moment later. Only
// [Schema.Probe] calls it.
func (c *Checker[C]) Warn(path, what, remedy string) {
	if p := c.problem(path, what, remedy); c.known(p) {
		c.warnings = append(c.warnings, p)
	}
}

// File reports the error of using the file that the field at path names, if err is not nil:
// as bad if the file has the wrong content, kind or mode, and as a warning if it is missing,
// or if this user may not read it, because the program may run elsewhere or as another one.
func (c *Checker[C]) File(path string, err error, remedy string) {
	switch {
	case err == nil:
	case IsPermanent(err) && !errors.Is(err, fs.ErrPermission):
		c.Bad(path, "cannot be used: "+err.Error(), remedy)
	default:
		c.Warn(path, "cannot be used here: "+err.Error(), remedy)
	}
}

// Listens reports the error of listening at the field's address or socket, if err is not nil.
// It is a warning: the program itself may be running, and another machine may have the address.
func (c *Checker[C]) Listens(path string, err error) {
	if err != nil {
		c.Warn(path, "cannot be listened on now: "+err.Error(), "")
	}
}

// Missing reports a required field without a value.
func (c *Checker[C]) Missing(path, what, remedy string) {
	if p := (Problem{Where: c.file, Path: path, What: what, Remedy: remedy}); c.known(p) {
		c.out = append(c.out, p)
	}
}

func (c *Checker[C]) problem(path, what, remedy string) Problem {
	i, name, item := c.index(path)
	f := &c.schema.Fields[i]
	return Problem{Where: c.origins[path], Path: path, Value: f.show(c.Config, name, item), What: what, Remedy: remedy}
}

// known reports whether the values of all fields that a problem is about are known.
func (c *Checker[C]) known(p Problem) bool {
	if c.unknown(p.Path) {
		return false
	}
	for i := range c.schema.Fields {
		path := c.schema.Fields[i].Path
		if path != p.Path && strings.Contains(p.What+p.Remedy, path) && c.unknown(path) {
			return false
		}
	}
	return true
}

// Origin returns where the field was set; empty for a default.
func (c *Checker[C]) Origin(path string) string { return c.origins[path] }

// NotEmpty reports string fields that have a default and were set to an empty value.
func (c *Checker[C]) NotEmpty(paths ...string) {
	for _, path := range paths {
		if f, name := c.schema.field(path); *f.pointer(c.Config, name).(*string) == "" {
			c.Bad(path, "is empty", "remove it for the default, "+f.Default)
		}
	}
}

// OneOf reports a string field that has none of the values, and returns whether it has one.
func (c *Checker[C]) OneOf(path, what string, values []string) bool {
	f, name := c.schema.field(path)
	ok := slices.Contains(values, *f.pointer(c.Config, name).(*string))
	if !ok {
		c.Bad(path, what, "use "+OneOf(values))
	}
	return ok
}

// sort sorts the problems in the order of the fields.
func (c *Checker[C]) sort() {
	order := func(p Problem) int { i, _, _ := c.index(p.Path); return i }
	for _, problems := range [][]Problem{c.out, c.warnings} {
		slices.SortStableFunc(problems, func(a, b Problem) int { return order(a) - order(b) })
	}
}

// index returns the index of the field of a path, and the name and list item in the path,
// which is -1 if there is none.
func (c *Checker[C]) index(path string) (i int, name string, item int) {
	item = -1
	if list, number, ok := strings.Cut(path, "["); ok {
		path = list
		if n, err := strconv.Atoi(strings.TrimSuffix(number, "]")); err == nil {
			item = n
		}
	}
	i, name = c.schema.index(path)
	return i, name, item
}

// BadAddress returns what is wrong with a host:port, or "". The address of a server to
// connect to needs a host, that of a listener does not.
func BadAddress(s string, needHost bool) string {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "is not host:port"
	}
	if host == "" && needHost {
		return "has no host"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || (n == 0 && needHost) {
		return "has no valid port"
	}
	return ""
}

// MaxSocketPath is the maximum length of a Unix socket's path: sun_path of unix(7)
// without its closing NUL.
const MaxSocketPath = 107

// OneOf lists values, one at least, as "a, b or c".
func OneOf(values []string) string {
	last := len(values) - 1
	if last == 0 {
		return values[0]
	}
	return strings.Join(values[:last], ", ") + " or " + values[last]
}
