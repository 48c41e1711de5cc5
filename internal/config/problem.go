package config

import (
	"net"
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
	return b.String()
}

// Error is all errors in a configuration.
type Error []Problem

// Permanent is true: a restart with the same configuration fails again.
func (e Error) Permanent() bool { return true }

// Error returns one line for each problem.
func (e Error) Error() string {
	lines := make([]string, len(e))
	for i, p := range e {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Checker collects the problems of Config, each with the place of its value. A path may
// also be that of an item of a list, operators.managers[0], or of a value of a map,
// deployments.default.address.
type Checker[C any] struct {
	Config *C

	schema  *Schema[C]
	file    string
	origins map[string]string
	out     []Problem
}

// Bad reports an invalid value of the field at path.
func (c *Checker[C]) Bad(path, what, remedy string) {
	i, name, item := c.index(path)
	f := &c.schema.Fields[i]
	c.out = append(c.out, Problem{
		Where: c.origins[path], Path: path, Value: f.show(c.Config, name, item), What: what, Remedy: remedy,
	})
}

// Missing reports a required field without a value.
func (c *Checker[C]) Missing(path, what, remedy string) {
	c.out = append(c.out, Problem{Where: c.file, Path: path, What: what, Remedy: remedy})
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

// sorted returns the problems in the order of the fields.
func (c *Checker[C]) sorted() []Problem {
	order := func(p Problem) int { i, _, _ := c.index(p.Path); return i }
	slices.SortStableFunc(c.out, func(a, b Problem) int { return order(a) - order(b) })
	return c.out
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
