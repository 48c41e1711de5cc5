package listen

import (
	"net"
	"net/netip"
)

// Client returns the client that an address belongs to: the IPv4 address, or the /64
// of an IPv6 address. Every machine can use a whole /64, so a limit for each address
// would have no effect. It returns the zero Prefix for a peer without an IP address,
// such as over a Unix socket or in memory; limits of clients do not apply to it.
func Client(address net.Addr) netip.Prefix {
	tcp, ok := address.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip, ok := netip.AddrFromSlice(tcp.IP)
	if !ok {
		return netip.Prefix{}
	}
	ip = ip.Unmap() // IPv4 at a dual-stack listener
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	return netip.PrefixFrom(ip, bits).Masked()
}

// Name returns the text for a client in logs.
func Name(client netip.Prefix) string {
	if !client.IsValid() {
		return "no IP address"
	}
	return client.String()
}

// siteBits is the prefix length of a [Site].
const siteBits = 48

// Site returns the /48 of an IPv6 client, which contains 65,536 clients: a provider
// typically gives one to a customer. It returns the zero Prefix for any other client.
func Site(client netip.Prefix) netip.Prefix {
	if !client.IsValid() || client.Addr().Is4() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(client.Addr(), siteBits).Masked()
}
