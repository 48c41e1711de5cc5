package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server/spireapi"
)

// limitFields are the fields of limits, and what each limits for one address.
var limitFields = [...]struct {
	name, doc string
	of        func(*spireapi.Limits) *int
}{
	{"attestation_rate", "Attestations a second.", func(l *spireapi.Limits) *int { return &l.Attestations }},
	{"x509_svid_rate", "X.509-SVIDs a second; a batch of 500 passes with a lower rate, too.", func(l *spireapi.Limits) *int { return &l.X509SVIDs }},
	{"jwt_svid_rate", "JWT-SVIDs a second.", func(l *spireapi.Limits) *int { return &l.JWTSVIDs }},
	{"status_rate", "Statuses a second; an agent sends one a minute.", func(l *spireapi.Limits) *int { return &l.Statuses }},
	{"report_rate", "Reports a second; an agent sends one a minute, and one every few seconds during a taint wave.", func(l *spireapi.Limits) *int { return &l.Reports }},
	{"handshakes", "Connections in their handshake.", func(l *spireapi.Limits) *int { return &l.Handshakes }},
	{"connections", "Connections of agents.", func(l *spireapi.Limits) *int { return &l.Known }},
	{"anonymous_connections", "Connections without an agent SVID.", func(l *spireapi.Limits) *int { return &l.Anonymous }},
	{"anonymous_calls", "Calls in flight on such connections.", func(l *spireapi.Limits) *int { return &l.AnonymousCalls }},
	{"agent_calls", "Calls in flight of each agent at the address.", func(l *spireapi.Limits) *int { return &l.CallerCalls }},
}

// limits are values of limitFields.
type limits [len(limitFields)]config.Limit

func (s *settings) network(name string) *limits { return named(&s.Networks, name) }

// limitRows returns the rows of all limits, with their defaults, and of those of a network.
func limitRows() (rows []config.Field[settings]) {
	defaults := spireapi.DefaultLimits
	for i, f := range limitFields {
		doc := f.doc
		if i == 0 {
			doc += " This and the next limits are for each address (an IPv4 address or an IPv6 /64) at the agents' ports. off: no limit."
		}
		rows = append(rows, config.Field[settings]{
			Path: "limits." + f.name, Value: func(c *settings) any { return &c.Limits[i] }, Default: strconv.Itoa(*f.of(&defaults)), Reload: true, Doc: doc,
		})
	}
	for i, f := range limitFields {
		doc := "limits." + f.name + " for each address in the network CIDR."
		if i == 0 {
			doc = "limits." + f.name + " for each address in the network CIDR, such as 10.0.0.0/8. Of several networks the smallest counts. A limit that is not set for it is that of limits."
		}
		rows = append(rows, config.Field[settings]{
			Path: "limits.networks.CIDR." + f.name, Named: func(c *settings, name string) any { return &c.network(name)[i] }, Reload: true, Doc: doc,
		})
	}
	return rows
}

// limits checks the networks.
func (c checker) limits() {
	for _, name := range slices.Sorted(maps.Keys(c.Config.Networks)) {
		what, remedy := badNetwork(name)
		if network, err := netip.ParsePrefix(name); what == "" && err == nil && network.Addr().Is6() && network.Bits() > clientBits {
			what, remedy = fmt.Sprintf("is smaller than a /%d, which is limited as one address", clientBits), fmt.Sprintf("write it as %s", netip.PrefixFrom(network.Addr(), clientBits).Masked())
		}
		if what != "" {
			c.Missing("limits.networks."+name, what, remedy)
		}
	}
	for i, network := range c.Config.Proxies {
		if what, remedy := badNetwork(network); what != "" {
			c.Bad(fmt.Sprintf("proxy_protocol.trusted_cidrs[%d]", i), what, remedy)
		}
	}
}

// clientBits is the prefix length of an IPv6 client, as package listen tells them apart.
const clientBits = 64

// badNetwork returns what is wrong with a network; "" if nothing is.
func badNetwork(text string) (what, remedy string) {
	network, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		if address, err := netip.ParseAddr(text); err == nil && address.Zone() == "" {
			return "has no prefix length", fmt.Sprintf("write it as %s", netip.PrefixFrom(address, address.BitLen()))
		}
		return "is not a network", "write it as 10.0.0.0/8 or 2001:db8::/32"
	case network.Addr().Is4In6():
		return "is an IPv4 network in IPv6 notation", "write it in IPv4 notation, such as 10.0.0.0/8"
	case network.Masked().String() != text:
		return "is not written as usual, or has bits after its prefix", fmt.Sprintf("write it as %s", network.Masked())
	}
	return "", ""
}

// clientLimits converts the limits.
func (s *settings) clientLimits() *spireapi.ClientLimits {
	out := &spireapi.ClientLimits{Default: s.Limits.over(spireapi.DefaultLimits)}
	for name, l := range s.Networks {
		if out.Networks == nil {
			out.Networks = make(map[netip.Prefix]spireapi.Limits)
		}
		out.Networks[netip.MustParsePrefix(name)] = l.over(out.Default)
	}
	return out
}

// over returns the limits with those that are set.
func (l *limits) over(limits spireapi.Limits) spireapi.Limits {
	for i, f := range limitFields {
		switch l[i] {
		case 0:
		case config.Off:
			*f.of(&limits) = 0
		default:
			*f.of(&limits) = int(l[i])
		}
	}
	return limits
}

// proxies converts the networks of load balancers.
func (s *settings) proxies() (out []netip.Prefix) {
	for _, text := range s.Proxies {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}
