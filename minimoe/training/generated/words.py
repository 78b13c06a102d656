"""The vocabulary of the generated documents: places, ships, parts, quantities. No people."""

from random import Random

PLACES = (
    "Bergen Tromso Rotterdam Antwerp Hamburg Gdansk Riga Tallinn Turku Malmo Aarhus Lisbon Porto Bilbao "
    "Marseille Genoa Trieste Split Piraeus Izmir Haifa Alexandria Tunis Dakar Lagos Durban Mombasa Mumbai "
    "Chennai Colombo Penang Manila Busan Osaka Kobe Sydney Hobart Auckland Valparaiso Callao Santos Montevideo "
    "Havana Boston Halifax Seattle Oakland"
).split()
SHIPS = (
    "Albatross Petrel Northern Star Kestrel Meridian Cormorant Polar Wind Sandpiper Equinox Guillemot Tern Solstice "
    "Curlew Aurora Osprey Tradewind Fulmar Horizon Kittiwake Zenith Plover Monsoon Gannet Estuary"
).split()
GOODS = (
    "barley copper timber cement coffee cotton steel rubber tea salt wool paper glass maize sugar flour cork slate "
    "granite zinc olive-oil rice cocoa tin linen"
).split()
PARTS = (
    "valve pump gasket bearing rotor flange shaft piston spring bracket filter gauge motor relay fuse lever pulley "
    "chain gear hinge nozzle sleeve washer bolt coupling clamp housing impeller seal bushing"
).split()
QUANTITIES = (
    "temperature pressure humidity voltage current speed torque level flow depth mass angle frequency power load "
    "salinity height width density energy"
).split()
ADJECTIVES = (
    "upper lower inner outer left right main spare front rear primary secondary small large steel brass copper hollow "
    "flat round heavy light fixed sliding cold warm"
).split()
STATES = "idle starting running paused stopping stopped failed ready waiting closed open locked".split()
COLOURS = "red green blue white black grey yellow orange violet brown cyan teal".split()
SECTIONS = (
    "Overview Installation Maintenance Inspection Storage Shipping Safety Calibration Cleaning Wiring Lubrication "
    "Testing Spares Assembly Measurements Limits Warranty Disposal Schedule Reports"
).split()


def code(rng: Random, letters: int = 2, digits: int = 4) -> str:
    """Draw an identifier such as KM-4071."""
    first = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXZ") for _ in range(letters))
    return first + "-" + "".join(rng.choice("0123456789") for _ in range(digits))
