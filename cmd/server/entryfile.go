package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/renewd/renewd/internal/api"
	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// maxEntriesFile bounds an entries file, in bytes.
const maxEntriesFile = 128 << 20

// entry is a registration entry as it is written in an entries file.
type entry struct {
	ID            string
	SPIFFEID      string
	ParentID      string
	Operator      bool
	Selectors     []string
	Hint          string
	FederatesWith []string
	DNSNames      []string
	X509TTL       time.Duration
	JWTTTL        time.Duration
	ExpiresAt     string

	DisableX509SVIDPrefetch bool
	JWTSVIDIncludeJTI       bool
}

// entrySchema describes an element of an entries file. Checks that need the server's
// state, such as its trust domain, are the server's.
var entrySchema = config.Schema[entry]{
	Help: "server help entries", Check: validateEntry,
	Fields: []config.Field[entry]{
		{Path: "id", Value: func(e *entry) any { return &e.ID }, Doc: "Name of the entry, unique in the file. When not set, an entry that is an edit of a stored one keeps its ID, and a new one gets a hash of parent_id, spiffe_id and selectors."},
		{Path: "spiffe_id", Value: func(e *entry) any { return &e.SPIFFEID }, Doc: "SPIFFE ID of the workloads. Required."},
		{Path: "parent_id", Value: func(e *entry) any { return &e.ParentID }, Doc: "Who serves the entry: the SPIFFE ID of an agent; that of an alias, for all nodes of the alias; or that of another entry, for the agents that serve it. Every agent serves it when not set. With spiffe://TRUSTDOMAIN/spire/server the entry is an alias: nodes with all of its selectors, such as k8s_psat:cluster:NAME, go by its spiffe_id, and no workload gets it."},
		{Path: "operator", Value: func(e *entry) any { return &e.Operator }, Doc: "Set true to let several agents serve an entry whose spiffe_id is in operators of the server's configuration. Otherwise the parent_id of such an entry must be an agent, because an agent with its SVID has the operator's role."},
		{Path: "selectors", Value: func(e *entry) any { return &e.Selectors }, Doc: "Selectors, such as unix:uid:1000. A workload must match all of them. Required."},
		{Path: "hint", Value: func(e *entry) any { return &e.Hint }, Doc: "Tells a workload with several identities which one to use."},
		{Path: "federates_with", Value: func(e *entry) any { return &e.FederatesWith }, Doc: "Other trust domains whose bundles the workloads get."},
		{Path: "dns_names", Value: func(e *entry) any { return &e.DNSNames }, Doc: "DNS names in X.509-SVIDs, for clients without SPIFFE support. The first is also the common name. At most 100; the first label may be *."},
		{Path: "x509_ttl", Value: func(e *entry) any { return &e.X509TTL }, Doc: "Lifetime of X.509-SVIDs, 1h to 168h. The server's default when not set."},
		{Path: "jwt_ttl", Value: func(e *entry) any { return &e.JWTTTL }, Doc: "Lifetime of JWT-SVIDs. The server's default when not set."},
		{Path: "expires_at", Value: func(e *entry) any { return &e.ExpiresAt }, Doc: "When the server deletes the entry, in quotes, such as \"2027-01-31T12:00:00Z\". Never when not set. SVIDs that it has signed live to their own end."},
		{Path: "disable_x509_svid_prefetch", Value: func(e *entry) any { return &e.DisableX509SVIDPrefetch }, Doc: "Set true to have an X.509-SVID minted only when a workload asks for it, and renewed only while a workload has a stream open. For workloads that use JWT-SVIDs only."},
		{Path: "jwt_svid_include_jti", Value: func(e *entry) any { return &e.JWTSVIDIncludeJTI }, Doc: "Set true to add a unique jti claim to each JWT-SVID. Every request then waits for the server to sign a new one."},
	},
}

func validateEntry(c *config.Checker[entry]) {
	e := c.Config
	if e.SPIFFEID == "" {
		c.Missing("spiffe_id", "is not set", "give the identity of the workloads, such as spiffe://example.org/web")
	} else {
		checkID(c, "spiffe_id", e.SPIFFEID, "write it as spiffe://example.org/web")
	}
	if e.ParentID != "" {
		checkID(c, "parent_id", e.ParentID, "write it as \"server agent list\" shows it, or as the spiffe_id of the alias")
	}
	if len(e.Selectors) == 0 {
		c.Missing("selectors", "is not set, and the entry would match every workload", "give at least one, such as unix:uid:1000")
	}
	for i, s := range e.Selectors {
		if kind, value, ok := strings.Cut(s, ":"); !ok || kind == "" || value == "" {
			c.Bad(fmt.Sprintf("selectors[%d]", i), "is not type:value", "write it as unix:uid:1000")
		}
	}
	for i, name := range e.FederatesWith {
		if err := config.CheckTrustDomain(name); err != nil {
			c.Bad(fmt.Sprintf("federates_with[%d]", i), err.Error(), "")
		}
	}
	if wrong, ok := errors.AsType[*keyset.DNSNameError](keyset.CheckDNSNames(e.DNSNames)); ok {
		c.Bad(fmt.Sprintf("dns_names[%d]", wrong.Index), wrong.Problem, wrong.Remedy)
	}
	if c.Origin("x509_ttl") != "" && (e.X509TTL < keyset.MinX509TTL || e.X509TTL > keyset.MaxX509TTL) {
		c.Bad("x509_ttl", "is not from "+config.Short(keyset.MinX509TTL)+" to "+config.Short(keyset.MaxX509TTL), "remove it for the server's default")
	}
	if c.Origin("jwt_ttl") != "" && e.JWTTTL < time.Second {
		c.Bad("jwt_ttl", "is shorter than a second", "remove it for the server's default")
	}
	if e.ExpiresAt != "" {
		if at, err := time.Parse(time.RFC3339, e.ExpiresAt); err != nil || at.Nanosecond() != 0 {
			c.Bad("expires_at", "is not a time in full seconds", "write it as \"2027-01-31T12:00:00Z\"")
		}
	}
}

// checkID checks a SPIFFE ID.
func checkID(c *config.Checker[entry], path, text, remedy string) {
	if id, err := spiffeid.FromString(text); err != nil {
		c.Bad(path, "is not a SPIFFE ID: "+err.Error(), remedy)
	} else if err := config.CheckTrustDomain(id.TrustDomain().Name()); err != nil {
		c.Bad(path, "has a trust domain that "+err.Error(), "")
	}
}

// loadEntries loads an entries file; - is standard input. An error in its content is a
// [config.Error].
func loadEntries(call *cli.Call, file string) ([]*api.Entry, error) {
	name, data, err := readEntries(call, file)
	if err != nil {
		return nil, err
	}
	return parseEntries(name, data)
}

// readEntries reads a file of entries; - is standard input. It returns its name for errors.
func readEntries(call *cli.Call, file string) (name string, data []byte, err error) {
	if name = file; file == "-" {
		name = "standard input"
		data, err = io.ReadAll(io.LimitReader(call.Stdin, maxEntriesFile+1))
		if err == nil && len(data) > maxEntriesFile {
			err = fmt.Errorf("%s has more than %d bytes", name, maxEntriesFile)
		}
	} else {
		data, err = config.ReadFile(file, maxEntriesFile)
	}
	if err != nil {
		return "", nil, fmt.Errorf("read entries: %w", err)
	}
	return name, data, nil
}

func parseEntries(file string, data []byte) ([]*api.Entry, error) {
	items, err := entrySchema.LoadList(file, data, "entries")
	if err != nil {
		return nil, err
	}
	var problems config.Error
	ids, hashes := map[string]int{}, map[string]int{} // indexes of entries, by ID and by what an ID is made of
	entries := make([]*api.Entry, len(items))
	for i, item := range items {
		e := item.Config
		entries[i] = e.proto()
		problem := config.Problem{Where: fmt.Sprintf("%s:%d", file, item.Line), Path: fmt.Sprintf("entries[%d].id", i)}
		hash := spireapi.EntryID(e.ParentID, e.SPIFFEID, e.Selectors)
		first, twice := ids[e.ID]
		similar, again := hashes[hash]
		switch {
		case e.ID != "" && twice:
			problem.Value, problem.What = fmt.Sprintf("%q", e.ID), fmt.Sprintf("is also the ID of the entry in line %d", items[first].Line)
			problem.Remedy = "give each entry a unique name"
			problems = append(problems, problem)
			continue
		case again && (e.ID == "" || items[similar].Config.ID == ""):
			problem.What = fmt.Sprintf("is needed: the entry in line %d has the same parent_id, spiffe_id and selectors, so their IDs would be equal", items[similar].Line)
			problem.Remedy = "remove one of the two, or give both an id"
			problems = append(problems, problem)
			continue
		}
		ids[e.ID] = i
		if !again {
			hashes[hash] = i
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return entries, nil
}

func (e *entry) proto() *api.Entry {
	out := &api.Entry{Id: e.ID, SpiffeId: e.SPIFFEID, ParentId: e.ParentID, Operator: e.Operator, Hint: e.Hint, FederatesWith: e.FederatesWith, DnsNames: e.DNSNames,
		DisableX509SvidPrefetch: e.DisableX509SVIDPrefetch, JwtSvidIncludeJti: e.JWTSVIDIncludeJTI}
	for _, s := range e.Selectors {
		kind, value, _ := strings.Cut(s, ":")
		out.Selectors = append(out.Selectors, &api.Selector{Type: kind, Value: value})
	}
	if e.X509TTL != 0 {
		out.X509Ttl = durationpb.New(e.X509TTL)
	}
	if e.JWTTTL != 0 {
		out.JwtTtl = durationpb.New(e.JWTTTL)
	}
	if at, err := time.Parse(time.RFC3339, e.ExpiresAt); err == nil { // checked by validateEntry
		out.ExpiresAt = timestamppb.New(at)
	}
	return out
}
