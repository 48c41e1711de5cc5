// Package selector knows every selector that the attestors of workloads and of nodes give,
// and so which selectors of entries can match nothing. The attestors' tests compare the list
// with what they give.
package selector

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/config"
)

// A name is what comes before the value in selectors of one type: uid in unix:uid:1000.
type name struct {
	name string
	// wrong returns why no attestor gives a value and how to write it, or "". nil: every
	// value is given.
	wrong func(value string) string
}

// A kind is a type of selectors, which an attestor of the same name gives.
type kind struct {
	name  string
	node  bool // they describe nodes, so they are for aliases
	names []name
}

// kinds are all selectors there are.
var kinds = []kind{
	{"unix", false, []name{
		{"uid", id}, {"user", notEmpty}, {"gid", id}, {"group", notEmpty}, {"supplementary_gid", id}, {"supplementary_group", notEmpty},
		{"path", path}, {"sha256", hash(64)},
	}},
	{"systemd", false, []name{{"id", unit}, {"fragment_path", pathOrNone}}},
	{"docker", false, []name{{"label", pair}, {"env", notEmpty}, {"image_id", notEmpty}, {"image_config_digest", notEmpty}}},
	{"k8s", false, []name{
		{"ns", notEmpty}, {"sa", nil}, {"node-name", notEmpty}, {"pod-uid", notEmpty}, {"pod-name", notEmpty},
		{"pod-image-count", id}, {"pod-init-image-count", id}, {"pod-image", nil}, {"pod-init-image", nil},
		{"pod-owner", pair}, {"pod-owner-uid", pair}, {"pod-label", pair}, {"ns-label", pair},
		{"container-name", notEmpty}, {"container-image", nil},
	}},
	// In the entry that "spire-server token generate -spiffeID" makes, which no workload gets:
	// it is the parent of others.
	{"spiffe_id", false, []name{{"", spiffeID}}},
	{"k8s_psat", true, []name{
		{"cluster", notEmpty}, {"agent_ns", notEmpty}, {"agent_sa", notEmpty}, {"agent_pod_name", notEmpty}, {"agent_pod_uid", notEmpty},
		{"agent_node_ip", nil}, {"agent_node_name", notEmpty}, {"agent_node_uid", notEmpty}, {"agent_node_label", pair}, {"agent_pod_label", pair},
	}},
	{"x509pop", true, []name{{"subject:cn", notEmpty}, {"ca:fingerprint", hash(40)}, {"serialnumber", hexadecimal}, {"san", pair}}},
}

// Check returns why no workload, or no node if the selector is that of an alias, ever has a
// selector, with a remedy; "" if there can be one that has it.
func Check(node bool, kindName, value string) string {
	k := kindOf(kindName)
	switch {
	case k == nil:
		return "no attestor gives selectors of the type " + strconv.Quote(kindName) + ": " + suggest(node, kindName, value)
	case node && !k.node:
		return "selectors of this type are those of workloads, and an alias needs those of nodes, such as k8s_psat:cluster:NAME"
	case !node && k.node:
		return "selectors of this type are those of nodes, and no workload has them: give them to an alias, and name the alias in parent_id"
	}
	n, rest := k.find(value)
	switch {
	case n == nil:
		return "no attestor gives it: " + suggest(node, kindName, value)
	case n.wrong == nil:
		return ""
	}
	return n.wrong(rest)
}

func kindOf(kindName string) *kind {
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.name == kindName })
	if i < 0 {
		return nil
	}
	return &kinds[i]
}

// find returns the name of a value and what is behind it; nil if it is unknown.
func (k *kind) find(value string) (n *name, rest string) {
	for i := range k.names {
		n = &k.names[i]
		if n.name == "" {
			return n, value
		}
		if rest, ok := strings.CutPrefix(value, n.name+":"); ok {
			return n, rest
		}
	}
	return nil, ""
}

// Compare returns how the selectors that an attestor gives, TYPE:VALUE, differ from the list:
// one that [Check] objects to, or a name in the list that none of them has; nil if in no way.
// It is for the attestors' tests.
func Compare(kindName string, given []string) error {
	k := kindOf(kindName)
	if k == nil {
		return fmt.Errorf("there is no type %q", kindName)
	}
	left := k.texts()
	for _, s := range given {
		kind, value, _ := strings.Cut(s, ":")
		if problem := Check(k.node, kind, value); kind != kindName || problem != "" {
			return fmt.Errorf("%q is given: %s", s, problem)
		}
		n, _ := k.find(value)
		left = slices.DeleteFunc(left, func(name string) bool { return name == n.name })
	}
	if len(left) > 0 {
		return fmt.Errorf("%s:%s is not given", kindName, left[0])
	}
	return nil
}

func (k *kind) texts() []string {
	out := make([]string, len(k.names))
	for i, n := range k.names {
		out[i] = n.name
	}
	return out
}

// suggest returns the remedy for an unknown selector: the nearest known one, or all.
func suggest(node bool, kindName, value string) string {
	first, _, _ := strings.Cut(value, ":")
	var types, known []string
	for _, k := range kinds {
		if k.node != node {
			continue
		}
		types = append(types, k.name)
		names := k.texts()
		switch near := config.Nearest(first, names); {
		case k.name == kindName && slices.Contains(names, value):
			return "write " + kindName + ":" + value + ":VALUE"
		case k.name == kindName && near != "":
			return "did you mean " + kindName + ":" + near + "?"
		case k.name == kindName:
			return "after " + kindName + ": comes " + config.OneOf(names)
		case slices.Contains(names, kindName): // uid:1000
			return "did you mean " + k.name + ":" + kindName + "?"
		}
		for _, n := range names {
			known = append(known, strings.TrimSuffix(k.name+":"+n, ":"))
		}
	}
	if near := config.Nearest(kindName+":"+first, known); near != "" {
		return "did you mean " + near + "?"
	}
	return "there are those of " + config.OneOf(types)
}

func notEmpty(value string) string {
	if value == "" {
		return "it has no value"
	}
	return ""
}

func id(value string) string {
	if n, err := strconv.ParseUint(value, 10, 32); err != nil || strconv.FormatUint(n, 10) != value {
		return strconv.Quote(value) + " is not a number from 0 to 4294967295: write the digits without sign and leading zeros"
	}
	return ""
}

func path(value string) string {
	if !strings.HasPrefix(value, "/") {
		return strconv.Quote(value) + " is not an absolute path: write it from / on"
	}
	if clean := filepath.Clean(value); clean != value {
		return fmt.Sprintf("%q is not as the kernel writes it: write %s", value, clean)
	}
	return ""
}

// pathOrNone is a path that is empty for a unit without a file.
func pathOrNone(value string) string {
	if value == "" {
		return ""
	}
	return path(value)
}

// hash returns a check of hashes with so many digits.
func hash(digits int) func(string) string {
	return func(value string) string {
		if len(value) != digits {
			return fmt.Sprintf("%q has %d characters: give the %d hex digits", value, len(value), digits)
		}
		return hexadecimal(value)
	}
}

func hexadecimal(value string) string {
	if value == "" || strings.Trim(value, "0123456789abcdef") != "" {
		return strconv.Quote(value) + " is not in hex: write the digits in lower case, without colons"
	}
	return ""
}

func unit(value string) string {
	if !strings.Contains(value, ".") {
		return strconv.Quote(value) + " is not the whole name of a unit: write it as " + value + ".service"
	}
	return ""
}

func pair(value string) string {
	if key, _, ok := strings.Cut(value, ":"); !ok || key == "" {
		return strconv.Quote(value) + " is not KEY:VALUE: add the value behind a colon"
	}
	return ""
}

func spiffeID(value string) string {
	if _, err := spiffeid.FromString(value); err != nil {
		return strconv.Quote(value) + " is not a SPIFFE ID: " + err.Error()
	}
	return ""
}
