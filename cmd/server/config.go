package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/admin"
	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/keyset"
	"github.com/renewd/renewd/internal/server/rotation"
)

// settings is the server's whole configuration. Every field has one row in
// [fields], which names it in the file, as a flag and in the environment.
type settings struct {
	TrustDomain          spiffeid.TrustDomain
	DataDir              string
	KeyFile              string
	Deployments          map[string]string // listen address by name
	AdminSocket          string
	AdminSocketMode      fs.FileMode
	OperatorAddress      string
	Managers             []string
	Readers              []string
	EndpointAddress      string
	EndpointProfile      string
	EndpointCertFile     string
	EndpointKeyFile      string
	RefreshHint          time.Duration
	FederatedURL         map[string]string // by trust domain
	FederatedProfile     map[string]string
	FederatedID          map[string]string
	FederatedFile        map[string]string
	MetricsAddress       string
	WebConfigFile        string
	KeysetLifetime       time.Duration
	X509TTL              time.Duration
	JWTTTL               time.Duration
	RotationMode         string
	PreparationThreshold time.Duration
	ActivationThreshold  time.Duration
	TaintThreshold       time.Duration
	LogLevel             slog.Level
	LogFormat            string
}

// schema is how the configuration is written, checked and documented.
var schema = config.Schema[settings]{Fields: fields, Env: "RENEWD_SERVER_", Help: "server help config", Check: validate}

const (
	defaultAddress = "0.0.0.0:8081"
	defaultSocket  = "/run/renewd-server/admin.sock"
)

// fields is the whole configuration, in the order in which it is documented.
var fields = []config.Field[settings]{
	{Path: "trust_domain", Value: func(c *settings) any { return &c.TrustDomain }, Doc: "Trust domain that the server signs for. Required, and the same ever after."},
	{Path: "data_dir", Value: func(c *settings) any { return &c.DataDir }, Default: "/var/lib/renewd-server", Doc: "Directory of the store: keysets, entries, agents, tokens, what was issued to whom, and the audit log."},
	{Path: "key_file", Value: func(c *settings) any { return &c.KeyFile }, Doc: "Key that the signing keys in the store are encrypted under, as \"server key new\" makes it. The systemd credential renewd-store-key when not set."},
	{Path: "deployments.NAME.listen_address", Value: func(c *settings) any { return &c.Deployments }, Doc: "Host and port where the deployment NAME listens for its agents. Each deployment has keysets, entries and agents of its own. One named default, on 0.0.0.0:8081, when none is given."},
	{Path: "admin_socket", Value: func(c *settings) any { return &c.AdminSocket }, Default: defaultSocket, Doc: "Unix socket for operators on this machine."},
	{Path: "admin_socket_mode", Value: func(c *settings) any { return &c.AdminSocketMode }, Default: "0660", Doc: "Permissions of the socket. With 0660 root and the server's group can connect, with 0666 everybody; what who connects may do is up to operators.managers and operators.readers."},
	{Path: "operators.address", Value: func(c *settings) any { return &c.OperatorAddress }, Doc: "Host and port where operators connect from elsewhere, with X.509-SVIDs of the trust domain. Empty: nowhere."},
	{Path: "operators.managers", Value: func(c *settings) any { return &c.Managers }, Doc: "Who may change things: unix:uid:0, unix:user:NAME, unix:gid:N or unix:group:NAME on the socket, spiffe://… over the network, whose entry names the agent that serves it (parent_id). Root and the server's own user when both lists are empty."},
	{Path: "operators.readers", Value: func(c *settings) any { return &c.Readers }, Doc: "Who may look, written in the same way. Managers may, too."},
	{Path: "bundle_endpoint.address", Value: func(c *settings) any { return &c.EndpointAddress }, Doc: "Host and port where relying parties get the trust bundle (/bundle) and the keys of JWT-SVIDs (/keys) over HTTPS. Empty: nowhere."},
	{Path: "bundle_endpoint.profile", Value: func(c *settings) any { return &c.EndpointProfile }, Default: server.ProfileSPIFFE, Doc: "https_spiffe: the server's own SVID is the certificate. https_web: it is in files."},
	{Path: "bundle_endpoint.cert_file", Value: func(c *settings) any { return &c.EndpointCertFile }, Doc: "Certificate chain (PEM) for https_web, read again when it changes."},
	{Path: "bundle_endpoint.key_file", Value: func(c *settings) any { return &c.EndpointKeyFile }, Doc: "Its private key (PEM)."},
	{Path: "bundle_endpoint.refresh_hint", Value: func(c *settings) any { return &c.RefreshHint }, Default: "5m", Doc: "How often relying parties are told to ask for the bundle, in whole seconds. 0s: they are not told."},
	{Path: "federation.TRUSTDOMAIN.endpoint_url", Value: func(c *settings) any { return &c.FederatedURL }, Doc: "Where the bundle of the trust domain TRUSTDOMAIN is: the https URL of its bundle endpoint. It is followed, and workloads whose entries federate with TRUSTDOMAIN get it. Without it what was held is forgotten."},
	{Path: "federation.TRUSTDOMAIN.profile", Value: func(c *settings) any { return &c.FederatedProfile }, Doc: "https_web: the endpoint is verified as a web server is, with the roots of this machine. https_spiffe: it proves itself with an X.509-SVID."},
	{Path: "federation.TRUSTDOMAIN.endpoint_spiffe_id", Value: func(c *settings) any { return &c.FederatedID }, Doc: "SPIFFE ID that an endpoint with https_spiffe has, of TRUSTDOMAIN itself, of trust_domain or of another trust domain that is followed."},
	{Path: "federation.TRUSTDOMAIN.bundle_file", Value: func(c *settings) any { return &c.FederatedFile }, Doc: "File with the bundle to begin with, in SPIFFE's format or PEM; an endpoint of TRUSTDOMAIN itself needs it for its first proof. What was fetched since counts for more, until the file has other authorities."},
	{Path: "metrics.address", Value: func(c *settings) any { return &c.MetricsAddress }, Default: "127.0.0.1:9091", Doc: "Where /metrics, /live and /ready are served. Empty: nowhere."},
	{Path: "metrics.web_config_file", Value: func(c *settings) any { return &c.WebConfigFile }, Doc: "Prometheus exporter web configuration file that turns on TLS and basic auth there."},
	{Path: "keysets.lifetime", Value: func(c *settings) any { return &c.KeysetLifetime }, Default: "2160h", Doc: "How long a new keyset lives: 90 days."},
	{Path: "keysets.x509_ttl", Value: func(c *settings) any { return &c.X509TTL }, Default: "24h", Doc: "Lifetime of X.509-SVIDs whose entry names none, 1h to 168h."},
	{Path: "keysets.jwt_ttl", Value: func(c *settings) any { return &c.JWTTTL }, Default: "24h", Doc: "Lifetime of JWT-SVIDs whose entry names none."},
	{Path: "rotation.mode", Value: func(c *settings) any { return &c.RotationMode }, Default: "on", Doc: "Automatic rotation: off, on, or paused: it says what it would do and does nothing."},
	{Path: "rotation.preparation_threshold", Value: func(c *settings) any { return &c.PreparationThreshold }, Doc: "How long before the active keyset's end its successor is prepared, at most half of keysets.lifetime. 14 days of a life of 90 when not set, and as much in proportion of another."},
	{Path: "rotation.activation_threshold", Value: func(c *settings) any { return &c.ActivationThreshold }, Doc: "Least age of a keyset that takes over, so that everybody who verifies knows it by then. One ninetieth of the life when not set: a day of 90."},
	{Path: "rotation.taint_threshold", Value: func(c *settings) any { return &c.TaintThreshold }, Doc: "How long after it was replaced a keyset is tainted. It is removed once that is safe. One ninetieth of the life when not set."},
	{Path: "log.level", Value: func(c *settings) any { return &c.LogLevel }, Default: "info", Doc: "debug, info, warn or error."},
	{Path: "log.format", Value: func(c *settings) any { return &c.LogFormat }, Default: "auto", Doc: "text, json, or auto: text on a terminal and JSON otherwise."},
}

var (
	profiles  = []string{server.ProfileSPIFFE, server.ProfileWeb}
	modes     = []string{string(rotation.Off), string(rotation.On), string(rotation.Paused)}
	plainName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,63}$`)
)

// checker collects what is wrong with the configuration.
type checker struct{ *config.Checker[settings] }

// validate reports everything about the configuration that cannot work.
func validate(shared *config.Checker[settings]) {
	c := checker{shared}
	if c.Origin("trust_domain") == "" {
		c.Missing("trust_domain", "is not set", "give the trust domain to sign for, such as example.org")
	}
	c.NotEmpty("data_dir", "admin_socket")
	c.places()
	c.operators()
	c.endpoint()
	c.federation()
	c.lifetimes()
	if !slices.Contains(cli.LogFormats, c.Config.LogFormat) {
		c.Bad("log.format", "is not a format", "use "+config.OneOf(cli.LogFormats))
	}
}

// places checks sockets and addresses, and that no two listeners share one.
func (c checker) places() {
	if n := len(c.Config.AdminSocket); n > config.MaxSocketPath {
		c.Bad("admin_socket", "is longer than the 107 bytes that the kernel takes", "choose a shorter path")
	}
	if c.Config.AdminSocketMode&0o600 != 0o600 {
		c.Bad("admin_socket_mode", "does not let its owner connect", "set at least 0600")
	}
	taken := map[string]string{}
	listener := func(path, address, example string) {
		if reason := config.BadAddress(address, false); reason != "" {
			c.Bad(path, reason, "write it as host:port, such as "+example)
		} else if other, dup := taken[address]; dup && !strings.HasSuffix(address, ":0") { // 0: a free one each
			c.Bad(path, "is the address of "+other, "give each its own")
		} else {
			taken[address] = path
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Deployments)) {
		path := "deployments." + name + ".listen_address"
		if !plainName.MatchString(name) {
			c.Bad(path, "is of a deployment that cannot have this name", "use up to 63 letters, digits, - and _")
			continue
		}
		listener(path, c.Config.Deployments[name], defaultAddress)
	}
	if len(c.Config.Deployments) == 0 {
		taken[defaultAddress] = "deployment " + server.DefaultDeployment
	}
	for _, l := range []struct{ path, address, example string }{
		{"operators.address", c.Config.OperatorAddress, "0.0.0.0:8082"},
		{"bundle_endpoint.address", c.Config.EndpointAddress, "0.0.0.0:8443"},
		{"metrics.address", c.Config.MetricsAddress, "127.0.0.1:9091"},
	} {
		if l.address != "" {
			listener(l.path, l.address, l.example)
		}
	}
	if c.Config.MetricsAddress == "" && c.Config.WebConfigFile != "" {
		c.Bad("metrics.web_config_file", "is of no use without metrics.address", "set metrics.address or remove it")
	}
}

// endpoint checks the bundle endpoint.
func (c checker) endpoint() {
	web := c.Config.EndpointProfile == server.ProfileWeb
	if !slices.Contains(profiles, c.Config.EndpointProfile) {
		c.Bad("bundle_endpoint.profile", "is not a profile", "use "+config.OneOf(profiles))
		return
	}
	for path, file := range map[string]string{"bundle_endpoint.cert_file": c.Config.EndpointCertFile, "bundle_endpoint.key_file": c.Config.EndpointKeyFile} {
		switch {
		case web && file == "":
			c.Missing(path, "is not set and profile "+server.ProfileWeb+" needs it", "give the PEM file")
		case !web && file != "":
			c.Bad(path, "is of no use with profile "+server.ProfileSPIFFE, "remove it or set bundle_endpoint.profile: "+server.ProfileWeb)
		}
	}
	if c.Config.RefreshHint < 0 || c.Config.RefreshHint%time.Second != 0 {
		c.Bad("bundle_endpoint.refresh_hint", "is not in whole seconds", "5m is usual")
	}
}

// federation checks the endpoints of other trust domains.
func (c checker) federation() {
	readable := true
	bad := func(name, field, what, remedy string) {
		c.Bad("federation."+name+"."+field, what, remedy)
		readable = false
	}
	for _, field := range c.Config.federated() {
		for _, name := range slices.Sorted(maps.Keys(field.values)) {
			if _, err := spiffeid.TrustDomainFromString(name); err != nil {
				bad(name, field.name, "is of a name that is no trust domain", "write it as federation: {partner.example: {…}}")
			} else if field.values[name] == "" {
				bad(name, field.name, "is empty", "give a value or remove it")
			} else if _, err := spiffeid.FromString(field.values[name]); field.name == "endpoint_spiffe_id" && err != nil {
				bad(name, field.name, "is not a SPIFFE ID", "write it as spiffe://"+name+"/spire/server")
			}
		}
	}
	if readable {
		c.endpoints(federation.Check(c.Config.TrustDomain, c.Config.endpoints()))
	}
}

// endpoints reports each endpoint that cannot work.
func (c checker) endpoints(err error) {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range all.Unwrap() {
			c.endpoints(err)
		}
		return
	}
	if p, ok := errors.AsType[*federation.EndpointError](err); ok {
		path := "federation." + p.TrustDomain.Name() + "." + p.Field
		if c.Origin(path) == "" {
			c.Missing(path, p.Problem, p.Remedy)
		} else {
			c.Bad(path, p.Problem, p.Remedy)
		}
	}
}

// federatedField is a field of all trust domains that are followed.
type federatedField struct {
	name   string
	values map[string]string
}

func (s *settings) federated() []federatedField {
	return []federatedField{
		{"endpoint_url", s.FederatedURL}, {"profile", s.FederatedProfile},
		{"endpoint_spiffe_id", s.FederatedID}, {"bundle_file", s.FederatedFile},
	}
}

// endpoints are those of the trust domains that are followed.
func (s *settings) endpoints() []federation.Endpoint {
	all := make(map[string]bool)
	for _, field := range s.federated() {
		for name := range field.values {
			all[name] = true
		}
	}
	var out []federation.Endpoint
	for _, name := range slices.Sorted(maps.Keys(all)) {
		e := federation.Endpoint{URL: s.FederatedURL[name], Profile: s.FederatedProfile[name], BundleFile: s.FederatedFile[name]}
		e.TrustDomain, _ = spiffeid.TrustDomainFromString(name)
		e.ID, _ = spiffeid.FromString(s.FederatedID[name])
		out = append(out, e)
	}
	return out
}

// lifetimes checks the durations of keysets, SVIDs and automatic rotation.
func (c checker) lifetimes() {
	s := c.Config
	if s.KeysetLifetime <= s.X509TTL {
		c.Bad("keysets.lifetime", "is not longer than keysets.x509_ttl, "+config.Short(s.X509TTL), "2160h, 90 days, is usual")
	}
	if s.X509TTL < keyset.MinX509TTL || s.X509TTL > keyset.MaxX509TTL {
		c.Bad("keysets.x509_ttl", "is not from "+config.Short(keyset.MinX509TTL)+" to "+config.Short(keyset.MaxX509TTL), "24h is usual")
	}
	if s.JWTTTL < time.Second {
		c.Bad("keysets.jwt_ttl", "is shorter than a second", "24h is usual")
	}
	if !slices.Contains(modes, s.RotationMode) {
		c.Bad("rotation.mode", "is not a mode", "use "+config.OneOf(modes))
	} else if _, err := s.policy().For(s.KeysetLifetime); err != nil {
		c.rotation(err)
	}
}

func (s *settings) policy() rotation.Policy {
	return rotation.Policy{
		Mode: rotation.Mode(s.RotationMode), PreparationThreshold: s.PreparationThreshold,
		ActivationThreshold: s.ActivationThreshold, TaintThreshold: s.TaintThreshold,
	}
}

// rotation reports the thresholds that do not fit.
func (c checker) rotation(err error) {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range all.Unwrap() {
			c.rotation(err)
		}
		return
	}
	if p, ok := errors.AsType[*rotation.PolicyError](err); ok {
		c.Bad("rotation."+p.Field, p.Problem, p.Remedy)
	}
}

// operators checks each rule of who may, as the server will read it.
func (c checker) operators() {
	if c.Config.TrustDomain.IsZero() {
		return
	}
	for path, rules := range map[string][]string{"operators.managers": c.Config.Managers, "operators.readers": c.Config.Readers} {
		for i, rule := range rules {
			if _, err := admin.ParseRules(c.Config.TrustDomain, []string{rule}, nil); err != nil {
				// The error begins with where it would be in a list of its own.
				_, what, _ := strings.Cut(err.Error(), strconv.Quote(rule)+" ")
				c.Bad(fmt.Sprintf("%s[%d]", path, i), what, "")
			}
		}
	}
}
