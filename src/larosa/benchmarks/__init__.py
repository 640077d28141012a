"""Speed measurements, each beside a dense baseline of the same run and the time that reading alone takes."""
