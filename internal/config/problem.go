package config

import (
	"net"
	"slices"
	"strconv"
	"strings"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	Where  string // file:line, file, flag or variable; may be empty
	Path   string // the field; empty when it is about the file as a whole
	Value  string // as given, quoted; empty for secrets and where there is none
	What   string // "is not a duration"
	Remedy string // what to do
}

// String is the problem in one line.
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
	return b.String()
}

// Error is everything that is wrong with a configuration.
type Error []Problem

// Error returns one line for each problem.
func (e Error) Error() string {
	lines := make([]string, len(e))
	for i, p := range e {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Checker collects what is wrong with the values of Config, each problem with
// the place that its value came from. A path may also name one item of a list,
// operators.managers[0], or one value of a map, deployments.default.address.
type Checker[C any] struct {
	Config *C

	schema  *Schema[C]
	file    string
	origins map[string]string
	out     []Problem
}

// Bad reports the value of the field at path.
func (c *Checker[C]) Bad(path, what, remedy string) {
	i, key := c.index(path)
	f := &c.schema.Fields[i]
	c.out = append(c.out, Problem{
		Where: c.origins[path], Path: path, Value: f.show(c.Config, key), What: what, Remedy: remedy,
	})
}

// Missing reports a field that has no value and needs one.
func (c *Checker[C]) Missing(path, what, remedy string) {
	c.out = append(c.out, Problem{Where: c.file, Path: path, What: what, Remedy: remedy})
}

// Origin says where the field was set; empty for a default.
func (c *Checker[C]) Origin(path string) string { return c.origins[path] }

// NotEmpty reports text fields that have a default and were made empty.
func (c *Checker[C]) NotEmpty(paths ...string) {
	for _, path := range paths {
		if f, _ := c.schema.field(path); *f.Value(c.Config).(*string) == "" {
			c.Bad(path, "is empty", "remove it for the default, "+f.Default)
		}
	}
}

// sorted returns the problems in the order of the fields.
func (c *Checker[C]) sorted() []Problem {
	order := func(p Problem) int { i, _ := c.index(p.Path); return i }
	slices.SortStableFunc(c.out, func(a, b Problem) int { return order(a) - order(b) })
	return c.out
}

// index finds the field of a path, and the name or the index in it.
func (c *Checker[C]) index(path string) (i int, key string) {
	if list, item, ok := strings.Cut(path, "["); ok {
		i, _ = c.schema.index(list)
		return i, strings.TrimSuffix(item, "]")
	}
	return c.schema.index(path)
}

// BadAddress says what is wrong with a host:port, or "". A server to connect
// to needs a host; a listener may leave it out.
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

// MaxSocketPath is the longest path of a Unix socket: sun_path of unix(7)
// without its closing NUL.
const MaxSocketPath = 107

// OneOf lists the values that are accepted.
func OneOf(values []string) string {
	last := len(values) - 1
	return strings.Join(values[:last], ", ") + " or " + values[last]
}
