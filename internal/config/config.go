// Package config loads the configuration of a program from a YAML file, the
// environment and flags, according to one table of fields. The help and the
// published list of fields are generated from the same table.
//
// A flag takes precedence over the environment, the environment over the file, and
// the file over the default. Loading reports all errors, not only the first. Each
// [Problem] has the place, the cause and the remedy.
package config

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Schema describes a program's configuration, whose values are in a C. It must not be
// modified while it is in use. Its methods may be called concurrently.
type Schema[C any] struct {
	// Fields are all fields, in the order of the documentation.
	Fields []Field[C]
	// Env is the prefix of the environment variables, such as RENEWD_.
	Env string
	// Help is the command that lists the fields, such as agent help config.
	Help string
	// Names returns the names that a C has in the place of a placeholder, sorted. before is
	// the part of the path before it. [Schema.Changes] needs it; nil if no field has one.
	Names func(c *C, before string) []string
	// Check reports invalid values. It is called only if every value was parsed; nil
	// checks nothing.
	Check func(*Checker[C])
	// Probe reports what this machine lacks for a configuration without problems, such as
	// files that cannot be read. Only [Schema.CheckFlags] calls it; nil reports nothing.
	Probe func(ctx context.Context, getenv func(string) string, c *Checker[C])
}

// Field describes a field of a configuration: its names, default and meaning.
type Field[C any] struct {
	// Path names the field in the file; a dot is a section. One part in capitals
	// may be a placeholder for a name that the operator chooses, which may have dots:
	// deployments.NAME.address.
	Path string
	// Value returns a pointer to the field, of type *string, *[]string, *bool,
	// *int, *int64, *[Limit], *time.Duration, *fs.FileMode, *slog.Level or
	// *spiffeid.TrustDomain. If Path has a placeholder, it is nil, and Named returns
	// the pointer for a name, which it adds when it is new. Such a field has neither
	// flag nor variable.
	Value func(*C) any
	Named func(c *C, name string) any
	// Default is in the same syntax as in the file; lists are empty. That of a field
	// with a placeholder is set for each name of its section.
	Default string
	Secret  bool   // never printed, and no flag: flags are visible to every process
	Reload  bool   // a running program applies a new value at SIGHUP
	Doc     string // one line
}

// Flag returns the field's flag without dashes; "" if it has none.
func (f *Field[C]) Flag() string {
	if f.Secret || f.chosen() {
		return ""
	}
	return strings.NewReplacer(".", "-", "_", "-").Replace(f.Path)
}

// Variable returns the field's environment variable; "" if it has none.
func (s *Schema[C]) Variable(f *Field[C]) string {
	if f.chosen() {
		return ""
	}
	return s.Env + strings.ToUpper(strings.ReplaceAll(f.Path, ".", "_"))
}

// Limit is a limit that can be switched off. The zero value is a limit that is not set.
type Limit int

// Off is no limit.
const Off Limit = -1

// String returns the limit as it is written in a file; empty if it is not set.
func (l Limit) String() string {
	switch l {
	case 0:
		return ""
	case Off:
		return "off"
	}
	return strconv.Itoa(int(l))
}

// The types of values in the documentation.
const (
	kindText     = "string"
	kindList     = "list of strings"
	kindBool     = "boolean"
	kindNumber   = "integer"
	kindLimit    = "integer or off"
	kindDuration = "duration"
	kindMode     = "octal mode"
	kindLevel    = "level"
)

// Kind returns the type of the field's value for the documentation.
func (f *Field[C]) Kind() string {
	switch f.pointer(new(C), "").(type) {
	case *[]string:
		return kindList
	case *bool:
		return kindBool
	case *int, *int64:
		return kindNumber
	case *Limit:
		return kindLimit
	case *time.Duration:
		return kindDuration
	case *fs.FileMode:
		return kindMode
	case *slog.Level:
		return kindLevel
	default:
		return kindText
	}
}

// pointer returns a pointer to the field in c, for a name if its path has a placeholder.
func (f *Field[C]) pointer(c *C, name string) any {
	if f.Named != nil {
		return f.Named(c, name)
	}
	return f.Value(c)
}

// Defaults returns a configuration of all default values.
func (s *Schema[C]) Defaults() *C {
	c := new(C)
	for i := range s.Fields {
		if f := &s.Fields[i]; !f.chosen() {
			f.setDefault(c, "")
		}
	}
	return c
}

// nameDefaults sets the defaults of all fields of the section with a placeholder that
// pattern belongs to, for a name.
func (s *Schema[C]) nameDefaults(c *C, pattern, name string) {
	for i := range s.Fields {
		if f := &s.Fields[i]; f.chosen() && beforeName(f.Path) == beforeName(pattern) {
			f.setDefault(c, name)
		}
	}
}

// beforeName returns the part of a path before its placeholder.
func beforeName(path string) string {
	parts := strings.Split(path, ".")
	return strings.Join(parts[:slices.IndexFunc(parts, isChosen)], ".")
}

func (f *Field[C]) setDefault(c *C, name string) {
	if f.Default == "" {
		return
	}
	if err := f.parse(c, name, f.Default); err != nil {
		panic(fmt.Sprintf("default of %s %v", f.Path, err))
	}
}

// parse stores text in c. The error says what text should be and does not contain it.
func (f *Field[C]) parse(c *C, name, text string) error {
	var err error
	switch p := f.pointer(c, name).(type) {
	case *string:
		*p = text
	case *[]string: // in the environment and in flags
		*p = nil
		for item := range strings.SplitSeq(text, ",") {
			if item = strings.TrimSpace(item); item == "" {
				return errors.New("is not a list such as A,B")
			}
			*p = append(*p, item)
		}
	case *bool:
		if text != "true" && text != "false" {
			return errors.New("is not a boolean")
		}
		*p = text == "true"
	case *int:
		if *p, err = strconv.Atoi(text); err != nil {
			return errors.New("is not an integer")
		}
	case *int64:
		if *p, err = strconv.ParseInt(text, 10, 64); err != nil {
			return errors.New("is not an integer")
		}
	case *Limit:
		n, err := strconv.ParseInt(text, 10, 32)
		switch {
		case text == Off.String():
			*p = Off
		case err != nil || n <= 0:
			return errors.New("is neither a positive integer nor off")
		default:
			*p = Limit(n)
		}
	case *time.Duration:
		if *p, err = time.ParseDuration(text); err != nil {
			return errors.New("is not a duration such as 500ms, 60s or 5m")
		}
	case *fs.FileMode:
		n, err := strconv.ParseUint(text, 8, 32)
		if err != nil || n > 0o777 {
			return errors.New("is not an octal mode such as 0770")
		}
		*p = fs.FileMode(n)
	case *slog.Level:
		levels := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
		level, ok := levels[text]
		if !ok {
			return errors.New("is not debug, info, warn or error")
		}
		*p = level
	case *spiffeid.TrustDomain:
		if err := CheckTrustDomain(text); err != nil {
			return err
		}
		*p, err = spiffeid.TrustDomainFromString(text)
		return err
	default:
		panic(fmt.Sprintf("field %s has type %T", f.Path, p))
	}
	return nil
}

// show formats the field's value for a name, or one item of a list; "" for a secret. An
// item is -1 for the whole list.
func (f *Field[C]) show(c *C, name string, item int) string {
	if f.Secret {
		return ""
	}
	switch p := f.pointer(c, name).(type) {
	case *string:
		return strconv.Quote(*p)
	case *[]string:
		if item >= 0 && item < len(*p) {
			return strconv.Quote((*p)[item])
		}
		return fmt.Sprintf("%q", *p)
	case *bool:
		return strconv.FormatBool(*p)
	case *int:
		return strconv.Itoa(*p)
	case *int64:
		return strconv.FormatInt(*p, 10)
	case *Limit:
		return p.String()
	case *time.Duration:
		return Short(*p)
	case *fs.FileMode:
		return fmt.Sprintf("%04o", *p)
	case *slog.Level:
		return strings.ToLower(p.String())
	case *spiffeid.TrustDomain:
		return p.Name()
	}
	return ""
}

// chosen reports whether the path has a placeholder.
func (f *Field[C]) chosen() bool { return slices.ContainsFunc(strings.Split(f.Path, "."), isChosen) }

func isChosen(part string) bool { return part != "" && part == strings.ToUpper(part) }

// index returns the index of the field for a path of the file, -1 if there is none, and
// the name in the place of the placeholder.
func (s *Schema[C]) index(path string) (i int, name string) {
	i = slices.IndexFunc(s.Fields, func(f Field[C]) bool {
		chosen, ok := match(f.Path, path)
		name = chosen
		return ok
	})
	return i, name
}

// match compares a field's path with one of a file and returns the name in the place of
// the placeholder.
func match(pattern, path string) (name string, ok bool) {
	want, have := strings.Split(pattern, "."), strings.Split(path, ".")
	if i := slices.IndexFunc(want, isChosen); i >= 0 && len(have) >= len(want) {
		// The name is between the parts before and after the placeholder.
		end := i + 1 + len(have) - len(want)
		name = strings.Join(have[i:end], ".")
		if strings.Contains("."+name+".", "..") {
			return "", false
		}
		have = slices.Replace(have, i, end, want[i])
	}
	return name, slices.Equal(want, have)
}

func (s *Schema[C]) field(path string) (f *Field[C], name string) {
	i, name := s.index(path)
	if i < 0 {
		return nil, ""
	}
	return &s.Fields[i], name
}

// section reports whether path, at this depth of the file, is a section with fields, and
// whether the operator chose its name.
func (s *Schema[C]) section(path string, depth int) (ok, chosen bool) {
	for i := range s.Fields {
		parts := strings.Split(s.Fields[i].Path, ".")
		if depth >= len(parts) {
			continue
		}
		if _, ok := match(strings.Join(parts[:depth], "."), path); ok {
			return true, isChosen(parts[depth-1])
		}
	}
	return false, false
}

// Short formats a duration without its zero parts: 1m, not 1m0s.
func Short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
